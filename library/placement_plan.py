#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module placement_plan: a thin shim over berth.plan."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: placement_plan
short_description: Plan on which GPU every Ray Serve replica goes
description:
  - Turns what the hosts' drivers show and the list of apps into a plan file, and says why each replica is where it is.
  - Runs on the controller. Writes nothing when any replica fits nowhere, unless O(allow_unplaced) is true.
  - What the last plan placed stays where it is while it fits and its strategy is the same.
options:
  hosts:
    description:
      - One entry per GPU host. Keys are C(host_gpus) (what M(gpu_info) returned for the host), C(rack), C(zone),
        C(slot_shapes) (lists of GPU UUIDs or indices that form one slot; every other GPU is a slot of its own),
        C(cordoned_gpus) (UUIDs or indices of GPUs that take nothing new) and C(gpu_costs) (product to cost, for pack).
    type: list
    elements: dict
    required: true
  apps:
    description:
      - The app list, as in C(serve_apps_list). Where an app gives no C(vram_mib), it is predicted from its
        C(config.json), or taken from C(footprints.json) beside O(path) when a replica like it ran before.
    type: raw
    required: true
  strategy:
    description: Cluster-wide strategy, one of C(pack), C(spread), C(strict_pack), C(strict_spread),
        C(balanced).
    type: str
    default: pack
  cluster:
    description: Name of this Berth cluster; GPU processes that carry another name, or none, are strangers.
    type: str
    required: true
  reserve_mib:
    description: MiB left unpromised on every GPU.
    type: int
    default: 512
  path:
    description: The plan file. The one before it is kept beside it as C(*.previous.json).
    type: path
    required: true
  max_moves:
    description: >-
      How many standing replicas may be moved so that others find room. Moves are made only where they let more be
      placed, or with O(repack).
    type: int
    default: 0
  repack:
    description: Plan by the strategy alone, moving at most O(max_moves) standing replicas.
    type: bool
    default: false
  allow_unplaced:
    description: Write the plan even when some replicas fit nowhere.
    type: bool
    default: false
  drain:
    description:
      - Hosts or slots to empty. What stands there is placed elsewhere; nothing new goes there until O(undrain).
      - It is kept in the plan, so that later runs leave them empty.
    type: list
    elements: str
    default: []
  undrain:
    description: Hosts or slots that take replicas again, or C(all).
    type: list
    elements: str
    default: []
  drain_partly:
    description: Let replicas stay on a drained slot where no other place has room; else that is a failure.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Returns the plan and the changes, writes nothing.
  diff_mode:
    support: full
    description: Shows slots and berths before and after as text.
requirements: [berth]
author: The Berth authors
"""

EXAMPLES = r"""
- name: Plan
  placement_plan:
    hosts: >-
      {{ groups['gpu'] | map('extract', hostvars) | map(attribute='berth_host_input') | list }}
    apps: "{{ serve_apps_list }}"
    strategy: "{{ strategy }}"
    cluster: "{{ berth_cluster_name }}"
    path: "{{ berth_state_dir }}/plan.json"
  delegate_to: localhost
  run_once: true
  register: __plan
"""

RETURN = r"""
plan:
  description: The plan, as in the file.
  returned: success
  type: dict
  sample: {strategy: pack, version: 1, slots: [], berths: [], unplaced: [], deployments: {}, retired: {}}
changes:
  description: What starts, scales, resizes and stops against the plan before, in the order that is safe.
  returned: success
  type: list
  elements: dict
  sample:
    - {kind: start, berth: chat@gpu01-0, before: 0, after: 2, vram_mib_before: 9828, vram_mib: 9828}
changes_text:
  description: The same, one line each.
  returned: success
  type: list
  elements: str
  sample: ["start chat@gpu01-0: 2 replicas of 9828 MiB"]
slots_by_host:
  description: The slots of every host, hosts without any included.
  returned: success
  type: dict
  sample: {gpu01: [{name: gpu01-0, gpu_uuids: [GPU-5a7c], vram_mib: 44956}]}
unplaced:
  description: Replicas that fit nowhere, each with the sum that shows why.
  returned: success, and when it fails because of them
  type: list
  elements: dict
  sample: []
problems:
  description: GPUs that got no slot, and what could not be known of the others.
  returned: success
  type: list
  elements: str
  sample: ["gpu01: GPU 3 (GPU-77aa) gets no slot: GPU is lost"]
map:
  description: The plan as lines of text for people.
  returned: success
  type: list
  elements: str
"""

import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

IMPORT_ERROR = None
try:
    from berth.codec import dump, replace
    from berth.errors import BerthError
    from berth.plan.apps import load_apps
    from berth.plan.diff import describe, diff_plans, flips, plan_text
    from berth.plan.drain import drained_slots, plan_drained
    from berth.plan.footprints import cards, footprints, store_beside
    from berth.plan.planner import Options, check_strategy, solve
    from berth.plan.pools import check_pools
    from berth.plan.slots import build_slots, load_hosts
    from berth.plan.store import read_plan, write_plan
    from berth.report.map import plan_map
except ImportError:
    IMPORT_ERROR = traceback.format_exc()


def plan_now(params):
    """The plan before, the plan now, and the problems met; touches nothing."""
    strategy = check_strategy(params["strategy"])
    apps = load_apps(params["apps"])
    path = Path(params["path"])
    before = read_plan(path)
    hosts = load_hosts(params["hosts"])
    slots, retired, problems = build_slots(hosts, before, params["reserve_mib"], params["cluster"])
    predicted = footprints(apps, cards(hosts, slots), before, store_beside(path))
    deployments = [
        app.deployment({product: item.vram_mib for product, item in predicted.get(app.name, {}).items()})
        for app in apps
    ]
    check_pools(deployments, slots)
    most = None if flips(before, deployments, strategy) else params["max_moves"]
    options = Options(max_moves=most, repack=params["repack"])
    drained = drained_slots(slots, before, params["drain"], params["undrain"])
    plan = plan_drained(
        slots,
        before,
        drained,
        params["drain_partly"],
        lambda open_slots, stands: solve(open_slots, deployments, strategy, stands, retired, options=options).plan,
    )
    return (before, replace(plan, footprints=predicted), problems, [host.gpus.host for host in hosts])


def drained_hint(plan):
    return f"; drained now: {', '.join(plan.drained)} (-e placement_undrain='[\"all\"]')" if plan.drained else ""


def result(before, plan, problems, hosts):
    changes = diff_plans(before, plan)
    return {
        "changed": before != plan,
        "plan": dump(plan),
        "changes": [dump(change) for change in changes],
        "changes_text": describe(changes),
        "slots_by_host": {host: [dump(slot) for slot in plan.slots if slot.host == host] for host in sorted(hosts)},
        "unplaced": [dump(item) for item in plan.unplaced],
        "problems": list(problems),
        "map": plan_map(plan).splitlines(),
        "diff": {
            "before_header": "plan before",
            "after_header": "plan now",
            "before": plan_text(before),
            "after": plan_text(plan),
        },
    }


def main():
    module = AnsibleModule(
        argument_spec={
            "hosts": {"type": "list", "elements": "dict", "required": True},
            "apps": {"type": "raw", "required": True},
            "strategy": {"type": "str", "default": "pack"},
            "cluster": {"type": "str", "required": True},
            "reserve_mib": {"type": "int", "default": 512},
            "path": {"type": "path", "required": True},
            "max_moves": {"type": "int", "default": 0},
            "repack": {"type": "bool", "default": False},
            "allow_unplaced": {"type": "bool", "default": False},
            "drain": {"type": "list", "elements": "str", "default": []},
            "undrain": {"type": "list", "elements": "str", "default": []},
            "drain_partly": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("berth"), exception=IMPORT_ERROR)
    try:
        before, plan, problems, hosts = plan_now(module.params)
        for problem in problems:
            module.warn(problem)
        if plan.unplaced and not module.params["allow_unplaced"]:
            refused = "; ".join(f"{item.deployment}: {item.reason}" for item in plan.unplaced)
            module.fail_json(
                msg=f"not every replica fits, nothing was written. {refused}. Mend: lower replicas or vram_mib in "
                "serve_apps_list, add GPUs, let standing replicas move (-e placement_max_moves=4), or set "
                f"placement_allow_unplaced{drained_hint(plan)}",
                unplaced=[dump(item) for item in plan.unplaced],
            )
        answer = result(before, plan, problems, hosts)
        if not module.check_mode:
            write_plan(Path(module.params["path"]), plan)
    except BerthError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
