#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name; nothing runs on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight_inventory
short_description: Find the mistakes that the inventory alone shows
description:
  - Looks at every host of the group, whatever C(--limit) says, and asks none of them.
  - Finds wrong options, unknown, removed and derived variables, wrong groups, GPUs named twice, ports that cannot be,
    mistakes of the app list, and a token that cannot be used. Changes nothing and fails for nothing that it finds.
options:
  group:
    description: The group of the cluster's hosts.
    type: str
    default: berth
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
- name: Look at the inventory
  preflight_inventory:
    group: berth
  run_once: true
  register: __preflight_inventory
"""

RETURN = r"""
problems:
  description: What is wrong (berth.preflight.problem.Problem).
  type: list
  elements: dict
  returned: always
  sample: []
ask:
  description: For each host what M(preflight_facts) shall look at.
  type: dict
  returned: always
  sample: {gpu01: {paths: [/var/lib/berth], ports: [8000]}}
wanted:
  description: For each host what it should be (berth.preflight.facts.Expectation).
  type: dict
  returned: always
  sample: {gpu01: {host: gpu01, disk_mib: 6144}}
accept:
  description: Kinds of problems that are only warned about (C(preflight_accept)).
  type: list
  elements: str
  returned: always
  sample: []
plan_path:
  description: The plan in force, or where it would be.
  type: str
  returned: always
  sample: inventories/onprem/.berth/plan.json
"""
