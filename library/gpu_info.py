#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The GPUs of a host as its driver shows them. A shim over berth.gpu.nvml."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_info
short_description: Read a host's GPUs from its driver
description:
  - Reads every GPU and MIG instance of the host through NVML, with its UUID, memory, topology, faults and processes.
  - Simulated GPUs are read by the same library call; put the C(environment) that M(gpu_sim) returns on the task.
  - Changes nothing.
options:
  host:
    description: The name that the host has in the inventory and in the plan.
    type: str
    required: true
  known_uuids:
    description:
      - Index to UUID of the GPUs as last seen.
      - The driver no longer tells the UUID of a lost GPU; with this it is known which one is lost.
    type: dict
    default: {}
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
- name: Read the GPUs
  gpu_info:
    host: "{{ inventory_hostname }}"
  register: __gpus

- name: Read simulated GPUs
  gpu_info:
    host: "{{ inventory_hostname }}"
  environment: "{{ __gpu_sim.environment }}"
  register: __gpus
"""

RETURN = r"""
host_gpus:
  description: The host's GPUs (berth.gpu.types.HostGpus). All memory is in MiB.
  returned: success
  type: dict
  sample:
    host: gpu01
    driver_version: 580.95.05
    simulated: false
    vram_scale: 1.0
    gpus:
      - uuid: GPU-6f1d7c3e-43a5-5b0e-9c55-0d6a54f6b5a1
        index: 0
        product: NVIDIA L40S
        total_mib: 46068
        reserved_mib: 582
        used_mib: 0
        compute_capability: "8.9"
        pci_bus_id: "00000000:3B:00.0"
        numa_node: 0
        nvlink_peers: []
        mig_parent: null
        lost: null
        xid: null
        processes: []
"""

import traceback  # noqa: E402 - Ansible's documentation comes first

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

try:
    from berth.codec import dump
    from berth.errors import BerthError
    from berth.gpu.nvml import read_host
except ImportError:
    MISSING: str | None = traceback.format_exc()
else:
    MISSING = None


def main() -> None:
    module = AnsibleModule(
        argument_spec={"host": {"type": "str", "required": True}, "known_uuids": {"type": "dict", "default": {}}},
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(
            msg=missing_required_lib("berth", reason="to read GPUs; run role berth_agent"), exception=MISSING
        )
    try:
        known = {int(index): str(uuid) for index, uuid in module.params["known_uuids"].items()}
    except ValueError:
        module.fail_json(
            msg=f"known_uuids: keys are indices; found: {', '.join(map(str, module.params['known_uuids']))}"
        )
    try:
        host_gpus = read_host(module.params["host"], known)
    except BerthError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, host_gpus=dump(host_gpus))


if __name__ == "__main__":
    main()
