#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Berth's units under systemd."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_units
short_description: Run exactly the wanted units of Berth under systemd
description:
  - Starts units that do not run, restarts those whose node configuration or unit text is another than what their
    process was started with, enables them for the next boot, stops and disables Berth's units that are not wanted.
  - Leaves every other unit of the host alone.
options:
  units:
    description: Name of each unit that must run, without C(.service), to the digest of its node's configuration.
    type: dict
    required: true
  unit_digests:
    description: Digest of the unit's text, by kind (C(head), C(slot)).
    type: dict
    required: true
attributes:
  check_mode:
    support: full
    description: Says what would be started, restarted, enabled, removed.
  diff_mode:
    support: full
    description: One line per unit.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Run the units
  systemd_units:
    units: {berth-ray-slot@gpu01-0: 0a4d55a8d778e5022fab701977c5d840bbc486d0}
    unit_digests: {head: "", slot: 11f6ad8ec52a2984abaafd7c3b516503785c2072}

- name: Stop all of Berth's units
  systemd_units: {units: {}, unit_digests: {}}
"""

RETURN = r"""
units:
  description: One line for each unit touched, with the reason.
  type: list
  elements: str
  returned: always
  sample:
    - 'berth-ray-head: started (it is inactive)'
restarted:
  description: Slots whose unit is restarted; what runs there goes down meanwhile.
  type: list
  elements: str
  returned: always
  sample:
    - gpu01-0
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.errors import BerthError
    from berth.host import systemd

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "units": {"type": "dict", "required": True},
            "unit_digests": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    digests = module.params["unit_digests"]
    wanted = [
        systemd.Wanted(name, sha1, digests["slot" if "@" in name else "head"])
        for name, sha1 in module.params["units"].items()
    ]
    try:
        steps = systemd.differences(wanted, systemd.read([unit.name for unit in wanted]))
        if not module.check_mode:
            systemd.apply(steps)
    except BerthError as error:
        module.fail_json(msg=str(error))
    lines = [str(step) for step in steps]
    module.exit_json(
        changed=bool(lines),
        units=lines,
        restarted=[step.unit.partition("@")[2] for step in steps if step.verb == "restarted" and "@" in step.unit],
        diff={"prepared": "\n".join(lines) + "\n"} if lines else {},
    )


if __name__ == "__main__":
    main()
