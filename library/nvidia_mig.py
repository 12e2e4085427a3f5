#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The MIG layout of a host's GPUs. A shim over berth.host.nvidia_mig."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_mig
short_description: Give GPUs their MIG instances
description:
  - Compares the instances of each GPU that is named with those it shall have, and makes them with C(nvidia-smi).
  - A GPU that a process or a berth of the plan uses is refused by name, and then no GPU is changed.
  - GPUs that are not named are left alone.
options:
  layout:
    description:
      - The GPUs, each with C(gpu) (UUID or index) and C(profiles) (names of GPU instance profiles).
      - Without profiles MIG is switched off.
    type: list
    elements: dict
    required: true
  occupied:
    description: Berths of the plan by the UUID of the GPU or instance that they are on.
    type: dict
    default: {}
author: The Berth authors
requirements:
  - berth (role berth_agent)
  - nvidia-smi
attributes:
  check_mode:
    description: Can run in check mode and tell what would change, changing nothing.
    support: full
  diff_mode:
    description: Shows the instances before and after.
    support: full
"""

EXAMPLES = r"""
- name: Two halves of the first GPU, the second one whole
  nvidia_mig:
    layout:
      - {gpu: "0", profiles: [3g.71gb, 3g.71gb]}
      - {gpu: "1", profiles: []}
"""

RETURN = r"""
commands:
  description: What was run, or would be in check mode.
  returned: success
  type: list
  elements: list
  sample:
    - [nvidia-smi, mig, -i, GPU-6f1d7c3e-43a5-5b0e-9c55-0d6a54f6b5a1, -cgi, "3g.71gb,3g.71gb", -C]
"""

import traceback  # noqa: E402 - Ansible's documentation comes first

from ansible.module_utils.basic import AnsibleModule, missing_required_lib  # noqa: E402

try:
    from berth.codec import load
    from berth.errors import BerthError
    from berth.host.nvidia_mig import MigWanted, decide, read_gpus, refuse
except ImportError:
    MISSING: str | None = traceback.format_exc()
else:
    MISSING = None


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "layout": {"type": "list", "elements": "dict", "required": True},
            "occupied": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=missing_required_lib("berth", reason="for MIG; run role berth_agent"), exception=MISSING)
    try:
        layout = load(tuple[MigWanted, ...], tuple(module.params["layout"]), "nvidia_driver_mig")
        decision = decide(read_gpus(), layout, module.params["occupied"])
        refuse(decision)
    except BerthError as error:
        module.fail_json(msg=str(error))
    done = []
    for command in [] if module.check_mode else decision.commands:
        code, out, err = module.run_command(list(command))
        if code:
            shown = " ".join(command)
            module.fail_json(msg=f"{shown} failed: {(err or out).strip()}; done before: {done or 'nothing'}")
        done.append(" ".join(command))
    module.exit_json(
        changed=bool(decision.commands),
        commands=[list(command) for command in decision.commands],
        diff={
            "before": "".join(f"{step.name}: {step.current}\n" for step in decision.steps),
            "after": "".join(f"{step.name}: {step.desired}\n" for step in decision.steps),
        },
    )


if __name__ == "__main__":
    main()
