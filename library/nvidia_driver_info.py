#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A host's NVIDIA driver, and what is to be done about it. A shim over berth.host.nvidia_facts and nvidia_driver."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_driver_info
short_description: Read a host's NVIDIA driver and decide what to do about it
description:
  - Reads kernel module, libraries, packages, package sources, PCI devices, Secure Boot and services of the host.
  - Compares them with what is wanted and returns the steps in between, in the order that they must be done.
  - NVML is not asked, so it works before there is a driver. Changes nothing.
options:
  host:
    description: The name that the host has in the inventory.
    type: str
    required: true
  wanted:
    description: What is wanted, by the names of the fields of berth.host.nvidia_types.Wanted.
    type: dict
    default: {}
  kernel_root:
    description:
      - Where the kernel's C(proc) and C(sys) are.
      - Another directory than V(/) stands for hardware that the host does not have.
    type: path
    default: /
author: The Berth authors
requirements:
  - berth (role berth_agent)
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
  diff_mode:
    description: Changes nothing, so there is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Read the driver, decide
  nvidia_driver_info:
    host: "{{ inventory_hostname }}"
    wanted: {branch: 580, allow_reboot: true}
  register: __driver

- name: Show what would be done
  show_text: {text: "{{ __driver.lines }}"}
"""

RETURN = r"""
decision:
  description: What to do (berth.host.nvidia_types.Decision).
  returned: success
  type: dict
  sample:
    action: install
    family: ubuntu
    target: 580.178.04
    open_modules: true
    packages: [nvidia-dkms-580-open=580.178.04-0ubuntu1]
    steps:
      - {name: nvidia-dkms-580-open, current: absent, desired: 580.178.04-0ubuntu1, why: the driver of branch 580}
    reboot: false
errors:
  description: The findings that a run must stop at, each as one sentence.
  returned: success
  type: list
  elements: str
  sample: []
lines:
  description: Steps and findings for people.
  returned: success
  type: list
  elements: str
  sample:
    - "gpu01: nvidia-dkms-580-open: absent -> 580.178.04-0ubuntu1 (the driver of branch 580)"
found:
  description: The host as it is (berth.host.nvidia_types.Found).
  returned: success
  type: dict
  sample: {host: gpu01, distribution: ubuntu, version: "24.04", loaded: null, library: null}
"""

import traceback  # noqa: E402 - Ansible's documentation comes first
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

try:
    from berth.codec import dump, load
    from berth.errors import BerthError
    from berth.host.nvidia_checks import errors, lines
    from berth.host.nvidia_driver import decide
    from berth.host.nvidia_facts import read_found
    from berth.host.nvidia_types import Wanted
except ImportError:
    MISSING: str | None = traceback.format_exc()
else:
    MISSING = None


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "wanted": {"type": "dict", "default": {}},
            "kernel_root": {"type": "path", "default": "/"},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(
            msg=missing_required_lib("berth", reason="to read the driver; run role berth_agent"), exception=MISSING
        )
    try:
        wanted = load(Wanted, module.params["wanted"], "the variables of role nvidia_driver")
        found = read_found(module.params["host"], wanted, Path(module.params["kernel_root"]))
        decision = decide(found, wanted)
    except BerthError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=False,
        decision=dump(decision),
        errors=[str(finding) for finding in errors(decision.findings)],
        lines=lines(found.host, decision),
        found=dump(found),
    )


if __name__ == "__main__":
    main()
