#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module placement_measured: a thin shim over berth.plan.footprints."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: placement_measured
short_description: Keep what running replicas really hold, for the next plan
description:
  - Writes the driver's figure for each model and GPU product whose footprint Berth predicted into C(footprints.json)
    beside the plan. A replica placed anew is planned with it; what stands keeps its promise.
  - Runs on the controller, after a verification without drift.
options:
  apps:
    description: The app list, as in C(serve_apps_list).
    type: raw
    required: true
  plan_path:
    description: The plan file.
    type: path
    required: true
  rows:
    description: What M(placement_verify) returned as C(rows).
    type: list
    elements: dict
    required: true
  hosts:
    description: Each host's GPUs as M(gpu_info) returned them, or in words why not; as for M(placement_verify).
    type: dict
    required: true
attributes:
  check_mode:
    support: none
    description: There is nothing to measure before something runs; the role does not call it in check mode.
  diff_mode:
    support: none
    description: The lines it returns tell what is new.
requirements: [berth]
author: The Berth authors
"""

EXAMPLES = r"""
- name: Keep what the replicas hold
  placement_measured:
    apps: "{{ serve_apps_list }}"
    plan_path: "{{ berth_plan_path }}"
    rows: "{{ placement_report.rows }}"
    hosts: {gpu01: "{{ nvidia_driver_seen.host_gpus }}"}
"""

RETURN = r"""
measured:
  description: One line for each figure newly kept.
  returned: success
  type: list
  elements: str
  sample: ["chat on NVIDIA L40S: 9828 MiB"]
findings:
  description: Predictions that were off by more than their bound, in words.
  returned: success
  type: list
  elements: str
  sample: []
"""

import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

IMPORT_ERROR = None
try:
    from berth.codec import load
    from berth.errors import BerthError
    from berth.plan.apps import load_apps
    from berth.plan.footprints import note_measured, store_beside
    from berth.plan.store import read_plan
    from berth.verify.compare import Row
except ImportError:
    IMPORT_ERROR = traceback.format_exc()


def main():
    module = AnsibleModule(
        argument_spec={
            "apps": {"type": "raw", "required": True},
            "plan_path": {"type": "path", "required": True},
            "rows": {"type": "list", "elements": "dict", "required": True},
            "hosts": {"type": "dict", "required": True},
        },
    )
    if IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("berth"), exception=IMPORT_ERROR)
    params = module.params
    path = Path(params["plan_path"])
    try:
        plan = read_plan(path)
        if plan is None:
            raise BerthError(f"there is no plan at {path}", mend="ansible-playbook site.yml")
        written, findings = note_measured(
            load_apps(params["apps"]),
            plan,
            {host: seen["vram_scale"] for host, seen in params["hosts"].items() if not isinstance(seen, str)},
            load(tuple[Row, ...], params["rows"], "rows"),
            store_beside(path),
        )
    except BerthError as error:
        module.fail_json(msg=str(error))
    for finding in findings:
        module.warn(f"predicted footprint: {finding}")
    module.exit_json(changed=bool(written), measured=written, findings=findings)


if __name__ == "__main__":
    main()
