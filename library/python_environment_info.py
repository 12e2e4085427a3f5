#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module python_environment_info: a thin shim over berth.host.environment."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: python_environment_info
short_description: What a virtual environment holds, and how it differs from its lock
description:
  - Reads what pip wrote about every installed package, and asks for the size of every file; reads no file otherwise.
  - Changes nothing.
options:
  path:
    description: The environment.
    type: path
    required: true
  lock:
    description: Text of the lock that it belongs to, lines of name==version.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: The module changes nothing.
  diff_mode:
    support: none
    description: The module changes nothing.
requirements: [berth]
author: The Berth authors
"""

EXAMPLES = r"""
- name: Look for the runtime environment
  python_environment_info:
    path: /var/lib/berth/runtime/60a125fa3a92
    lock: "{{ lookup('ansible.builtin.file', 'runtime-gpu.txt') }}"
"""

RETURN = r"""
complete:
  description: Whether it was installed to its end.
  returned: always
  type: bool
  sample: true
python:
  description: Minor version of its interpreter, empty where there is none.
  returned: always
  type: str
  sample: "3.12"
hash:
  description: One value over interpreter and packages; equal on two hosts whose environments are the same.
  returned: always
  type: str
  sample: 69a14f320b8a8a8e8057fce305aa036b3d95a040e08b5222486fbf221690362e
packages:
  description: Package name to its version and a hash of its files.
  returned: always
  type: dict
  sample: {ray: {version: 2.60.0, content: 9b63cc2e5c78}}
recorded:
  description: Whether its packages were written down when it was completed.
  returned: always
  type: bool
  sample: true
record:
  description: What to write down when it is complete.
  returned: always
  type: str
install:
  description: Packages to install again, as name==version, so that it is what the lock says.
  returned: always
  type: list
  elements: str
  sample: []
remove:
  description: Packages that the lock does not have.
  returned: always
  type: list
  elements: str
  sample: []
reasons:
  description: The same for people, one line per package.
  returned: always
  type: list
  elements: str
  sample: ["numpy 2.3.5 is damaged (numpy/version.py)"]
wheel:
  description: Which wheel of Berth's own was installed into it, or empty.
  returned: always
  type: str
  sample: 0a4d55a8d778e5022fab701977c5d840bbc486d0
current:
  description: Name of the complete environment that the link C(current) beside it points to, or empty.
  returned: always
  type: str
  sample: 60a125fa3a92
current_lock:
  description: What the lock of that environment pins, name to version; empty where there is none.
  returned: always
  type: dict
  sample: {ray: 2.60.0}
previous:
  description: Likewise for the link C(previous).
  returned: always
  type: str
  sample: ""
environments:
  description: Names of the environments beside it, itself included.
  returned: always
  type: list
  elements: str
  sample: [60a125fa3a92]
"""

from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.errors import BerthError
    from berth.host.environment import describe

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "required": True}, "lock": {"type": "str", "required": True}},
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    try:
        module.exit_json(changed=False, **describe(Path(module.params["path"]), module.params["lock"]))
    except BerthError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
