#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Judge what preflight_facts read. A shim over berth.preflight; runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight_report
short_description: Make one list of everything that is wrong, over all hosts
description:
  - Holds what each host said against what the inventory wants, and the hosts against each other.
  - Changes nothing, and fails for nothing that it finds; RV(errors) says whether a run may go on.
options:
  problems:
    description: What M(preflight_inventory) found.
    type: list
    elements: dict
    required: true
  wanted:
    description: What M(preflight_inventory) expects of each host.
    type: dict
    required: true
  answers:
    description: What M(preflight_facts) registered, by host; without the hosts that were not asked.
    type: dict
    default: {}
  accept:
    description: Kinds of problems that are only warned about.
    type: list
    elements: str
    default: []
  plan_path:
    description: The plan in force; GPUs that have vanished since are told. Nothing is when it is not there.
    type: str
    default: ''
attributes:
  check_mode:
    support: full
    description: Only reads.
  diff_mode:
    support: none
    description: Only reads.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Make one list
  preflight_report:
    problems: "{{ __preflight_inventory.problems }}"
    wanted: "{{ __preflight_inventory.wanted }}"
    answers: {gpu01: "{{ __preflight_facts }}"}
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
problems:
  description: Everything that is wrong, errors first (berth.preflight.problem.Problem).
  type: list
  elements: dict
  returned: always
  sample:
    - kind: disk
      severity: error
      objects: [gpu01]
      what: /var/lib/berth has 900 MiB free, the runtime needs 6144
      found: 900 MiB on /
      allowed: 6144 MiB (preflight_disk_mib)
      mend: make room, or set berth_state_dir elsewhere
errors:
  description: How many of them are errors.
  type: int
  returned: always
  sample: 1
headline:
  description: How many there are, and where.
  type: str
  returned: always
  sample: 1 error (gpu01)
text:
  description: The list for people, line by line.
  type: list
  elements: str
  returned: always
  sample: ["Preflight: 3 hosts: nothing to mend"]
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.codec import dump
    from berth.errors import BerthError
    from berth.preflight.report import make_report

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "problems": {"type": "list", "elements": "dict", "required": True},
            "wanted": {"type": "dict", "required": True},
            "answers": {"type": "dict", "default": {}},
            "accept": {"type": "list", "elements": "str", "default": []},
            "plan_path": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run `make setup` on the controller")
    try:
        report = make_report(**module.params)
    except BerthError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **dump(report))


if __name__ == "__main__":
    main()
