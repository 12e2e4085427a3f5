#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A simulated GPU driver on a host. A shim over berth.gpu.sim."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_sim
short_description: Put a simulated GPU driver on a host, or take it away
description:
  - Builds a C(libnvidia-ml.so.1) that shows the GPUs of a profile, with the host's own C compiler.
  - Processes see it through the C(environment) that is returned; nothing else on the host changes.
  - Faults injected since (C(python -m berth.gpu.sim inject)) survive another run with the same profile and seed;
    another profile or seed replaces them.
options:
  state:
    description: Whether the simulation is there.
    type: str
    choices: [present, absent]
    default: present
  directory:
    description: Where it lives on the host.
    type: path
    required: true
  profile:
    description: A profile file on the host, or the name of one that comes with Berth, such as V(l40s-x4).
    type: str
  profile_data:
    description: The profile itself.
    type: dict
  seed:
    description: UUIDs that the profile leaves out follow from it. Give every host its own, such as its inventory name.
    type: str
    default: ""
author: The Berth authors
requirements:
  - berth (role berth_agent)
  - gcc or cc
attributes:
  check_mode:
    description: Can run in check mode and tell what would change, changing nothing.
    support: full
  diff_mode:
    description: Shows the profile before and after.
    support: full
"""

EXAMPLES = r"""
- name: Simulate four L40S
  gpu_sim:
    directory: /var/lib/berth/gpu-sim
    profile: l40s-x4
    seed: "{{ inventory_hostname }}"
  register: __gpu_sim

- name: Simulate one small GPU
  gpu_sim:
    directory: /var/lib/berth/gpu-sim
    seed: "{{ inventory_hostname }}"
    profile_data:
      driver_version: "580.95.05"
      gpus:
        - {product: NVIDIA L4, memory_mib: 23034, reserved_mib: 513, compute_capability: "8.9"}

- name: Back to real GPUs
  gpu_sim:
    directory: /var/lib/berth/gpu-sim
    state: absent
"""

RETURN = r"""
environment:
  description: What a process needs in its environment to see the simulated GPUs; empty when absent.
  returned: success
  type: dict
  sample:
    LD_LIBRARY_PATH: /var/lib/berth/gpu-sim/lib
    BERTH_GPU_SIM: /var/lib/berth/gpu-sim
    BERTH_GPU_KERNEL_LOG: /var/lib/berth/gpu-sim/kernel.log
reasons:
  description: What differed.
  returned: success
  type: list
  elements: str
  sample: [profile or seed]
"""

import traceback  # noqa: E402 - Ansible's documentation comes first
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

try:
    from berth.errors import BerthError
    from berth.gpu.sim import build
    from berth.gpu.sim.profile import named
except ImportError:
    MISSING: str | None = traceback.format_exc()
else:
    MISSING = None


def present(params: dict[str, object], directory: Path, check_mode: bool) -> dict[str, object]:
    name = params["profile"]
    data, what = named(str(name)) if name else (params["profile_data"], "profile_data")
    act = build.differences if check_mode else build.install
    change = act(directory, data, str(params["seed"]), what)
    return {
        "changed": bool(change.reasons),
        "reasons": list(change.reasons),
        "environment": build.environment(directory),
        "diff": {"before": change.before, "after": change.after, "before_header": "wanted", "after_header": "wanted"},
    }


def absent(directory: Path, check_mode: bool) -> dict[str, object]:
    wanted = directory / build.WANTED
    before = wanted.read_text(encoding="utf-8") if wanted.is_file() else ""
    changed = build.is_simulation(directory) if check_mode else build.remove(directory)
    reasons = ["simulation"] if changed else []
    return {"changed": changed, "reasons": reasons, "environment": {}, "diff": {"before": before, "after": ""}}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "directory": {"type": "path", "required": True},
            "profile": {"type": "str"},
            "profile_data": {"type": "dict"},
            "seed": {"type": "str", "default": ""},
        },
        mutually_exclusive=[("profile", "profile_data")],
        required_if=[("state", "present", ("profile", "profile_data"), True)],
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(
            msg=missing_required_lib("berth", reason="to simulate GPUs; run role berth_agent"), exception=MISSING
        )
    directory = Path(module.params["directory"])
    try:
        if module.params["state"] == "present":
            result = present(module.params, directory, module.check_mode)
        else:
            result = absent(directory, module.check_mode)
    except BerthError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
