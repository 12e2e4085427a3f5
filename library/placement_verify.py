#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module placement_verify: a thin shim over berth.verify."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: placement_verify
short_description: Compare the plan, Ray's state and the driver's view
description:
  - Three witnesses must agree on where every replica is. Every difference is returned with what was found, what was
    wanted, and the command that mends it.
  - Runs on the controller, on facts that other modules gathered. Changes nothing.
options:
  plan:
    description: The plan itself. Exactly one of O(plan) and O(path) is needed.
    type: dict
  path:
    description: The plan file.
    type: path
  ray_state:
    description: What M(ray_state_info) returned.
    type: dict
    required: true
  hosts:
    description: For each host what M(gpu_info) returned for it, or a text that says why it could not be asked.
    type: dict
    required: true
  cluster:
    description: Name of this Berth cluster; GPU processes that carry another name, or none, are strangers.
    type: str
    required: true
  runtimes:
    description: How the runtime environments of the hosts differ, one entry per host and package.
    type: list
    elements: dict
    default: []
  fail_on_drift:
    description: Fail, naming every drift, when the witnesses disagree.
    type: bool
    default: false
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
- name: Verify
  placement_verify:
    path: "{{ berth_state_dir }}/plan.json"
    ray_state: "{{ __ray_state.ray_state }}"
    hosts: "{{ __host_gpus }}"
    cluster: "{{ berth_cluster_name }}"
    fail_on_drift: true
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
ok:
  description: Whether every witness was heard and none disagrees.
  returned: always
  type: bool
  sample: false
exit_code:
  description: 0 as wanted, 1 drift, 2 could not tell.
  returned: always
  type: int
  sample: 1
findings:
  description: Differences (severity C(drift)), what could not be told (C(unknown)) and remarks (C(note)), worst first.
  returned: always
  type: list
  elements: dict
  sample:
    - kind: replica_missing
      severity: drift
      object: chat@gpu01-0
      gpu_uuid: GPU-5a7c
      found: 1 RUNNING
      wanted: "2"
      mend: ansible-playbook site.yml (docs/GPU_PLACEMENT_PLAYBOOK.md#replica_missing)
      text: "replica_missing: chat@gpu01-0 [GPU-5a7c]: found 1 RUNNING; wanted 2; mend: ansible-playbook site.yml"
failures:
  description: The findings of severity C(drift) alone.
  returned: always
  type: list
  elements: dict
rows:
  description: One entry per GPU, planned, Ray's and the driver's MiB side by side.
  returned: always
  type: list
  elements: dict
map:
  description: The same as lines of text for people, with the findings below.
  returned: always
  type: list
  elements: str
"""

import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

IMPORT_ERROR = None
try:
    from berth.codec import dump, load
    from berth.errors import BerthError
    from berth.gpu.types import HostGpus
    from berth.host.environment import Difference
    from berth.plan.store import read_plan
    from berth.plan.types import Plan
    from berth.ray.types import RayState
    from berth.report.map import findings_text, terminal_map
    from berth.verify.compare import verify
except ImportError:
    IMPORT_ERROR = traceback.format_exc()


def read_inputs(params):
    """The three witnesses, parsed."""
    plan = load(Plan, params["plan"], "plan") if params["plan"] is not None else read_plan(Path(params["path"]))
    if plan is None:
        raise BerthError(f"there is no plan at {params['path']}", mend="ansible-playbook site.yml")
    hosts = {
        host: seen if isinstance(seen, str) else load(HostGpus, seen, f"hosts.{host}")
        for host, seen in params["hosts"].items()
    }
    return plan, load(RayState, params["ray_state"], "ray_state"), hosts


def answer(report):
    findings = [dump(finding) for finding in report.findings]
    return {
        "changed": False,
        "ok": report.ok,
        "exit_code": report.exit_code,
        "findings": findings,
        "failures": [finding for finding in findings if finding["severity"] == "drift"],
        "rows": [dump(row) for row in report.rows],
        "map": [*terminal_map(report).splitlines(), "", *findings_text(report).splitlines()],
    }


def main():
    module = AnsibleModule(
        argument_spec={
            "plan": {"type": "dict"},
            "path": {"type": "path"},
            "ray_state": {"type": "dict", "required": True},
            "hosts": {"type": "dict", "required": True},
            "cluster": {"type": "str", "required": True},
            "runtimes": {"type": "list", "elements": "dict", "default": []},
            "fail_on_drift": {"type": "bool", "default": False},
        },
        mutually_exclusive=[["plan", "path"]],
        required_one_of=[["plan", "path"]],
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("berth"), exception=IMPORT_ERROR)
    try:
        plan, ray_state, hosts = read_inputs(module.params)
        runtimes = load(tuple[Difference, ...], module.params["runtimes"], "runtimes")
    except BerthError as error:
        module.fail_json(msg=str(error))
    report = verify(plan, ray_state, hosts, module.params["cluster"], runtimes)
    found = answer(report)
    if module.params["fail_on_drift"] and found["failures"]:
        drifts = "\n".join(failure["text"] for failure in found["failures"])
        module.fail_json(msg=f"{len(found['failures'])} drifts:\n{drifts}", **found)
    module.exit_json(**found)


if __name__ == "__main__":
    main()
