#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module python_environments: a thin shim over berth.host.environment."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: python_environments
short_description: Remove virtual environments that are no longer needed
description:
  - Of the environments that lie side by side below O(root), those of O(spare) and the newest stay, O(keep) in all, and
    every one that a process runs from.
options:
  root:
    description: Where the environments lie, each in a directory named after its lock's hash; nothing else is touched.
    type: path
    required: true
  spare:
    description: Names of environments that stay whatever their age.
    type: list
    elements: str
    default: []
  keep:
    description: How many stay, 2 or more.
    type: int
    default: 2
attributes:
  check_mode:
    support: full
    description: Says what it would remove.
  diff_mode:
    support: full
    description: The names before and after.
requirements: [berth]
author: The Berth authors
"""

EXAMPLES = r"""
- name: Remove old environments
  python_environments:
    root: /var/lib/berth/runtime
    spare: [60a125fa3a92, 9b63cc2e5c78]
"""

RETURN = r"""
removed:
  description: Names of the environments that were removed, or would be.
  returned: always
  type: list
  elements: str
  sample: []
in_use:
  description: Names of those that a process runs from.
  returned: always
  type: list
  elements: str
  sample: [60a125fa3a92]
"""

from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.errors import BerthError
    from berth.host.environment import environments, remove, superfluous, used

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "spare": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "int", "default": 2},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    root = Path(module.params["root"])
    found = environments(root)
    in_use = used(root)
    try:
        gone = superfluous(found, module.params["spare"], module.params["keep"], in_use)
    except BerthError as error:
        module.fail_json(msg=str(error))
    names = [item.name for item in found]
    if not module.check_mode:
        for name in gone:
            remove(root / name)
    diff = {
        "before": "".join(f"{name}\n" for name in names),
        "after": "".join(f"{name}\n" for name in names if name not in gone),
    }
    module.exit_json(changed=bool(gone), removed=list(gone), in_use=sorted(in_use), diff=diff)


if __name__ == "__main__":
    main()
