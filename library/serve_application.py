#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""One pass of the rollout of a plan's berths on Ray Serve."""

from __future__ import annotations

DOCUMENTATION = r"""
module: serve_application
short_description: Make Ray Serve run what the plan says, and nothing of ours beside it
description:
  - Declarative, through Serve's REST API; apps that Berth did not deploy are kept as they are.
  - Its action plugin repeats the passes until the plan runs, shows each as it happens, and gives up after I(timeout_s).
  - Berths are made before others are broken; where there is no room for both, it says which model is down meanwhile.
options:
  address:
    description: Ray's dashboard, http://host:port.
    type: str
    required: true
  token_file:
    description: File with Ray's token.
    type: path
    default: ''
  plan:
    description: The plan (placement_plan's result). Leave out to remove every berth and the gateway.
    type: dict
  apps:
    description: The app list.
    type: list
    elements: dict
    default: []
  options:
    description: Serve's options (host, port, route_prefix, gateway_replicas, drain_s, env).
    type: dict
    required: true
  timeout_s:
    description: Seconds until the rollout is given up.
    type: int
    default: 900
  slot_timeout_s:
    description: Seconds to wait for slots to join Ray.
    type: int
    default: 120
  expected_start_s:
    description: What one engine start takes here; for the message when a model is down.
    type: int
    default: 60
  known:
    description: Set by the action plugin; what was waited for when it last looked.
    type: str
    default: ""
  watch_s:
    description: Set by the action plugin; how long to look on while nothing but I(known) is waited for.
    type: float
    default: 0.0
  phase:
    description: Set by the action plugin.
    choices:
      - first
      - next
      - why
    default: first
    type: str
attributes:
  check_mode:
    support: full
    description: Lists the steps it would take.
  diff_mode:
    support: full
    description: The steps.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Deploy
  serve_application:
    address: http://127.0.0.1:8275
    plan: "{{ plan }}"
    apps: "{{ apps }}"
    options: {host: 127.0.0.1, port: 8000}
"""

RETURN = r"""
kind:
  description: put (a step was taken), wait, done.
  type: str
  returned: always
  sample: done
text:
  description: The step, or what is waited for.
  type: str
  returned: always
  sample: as planned
steps:
  description: Every step taken.
  type: list
  elements: str
  returned: always
  sample:
    - make chat@gpu01-0
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.codec import load
    from berth.errors import BerthError
    from berth.plan.apps import load_apps
    from berth.plan.types import Plan
    from berth.ray.client import RayClient, Refused, read_token
    from berth.ray.deploy import rehearse, stuck, watch
    from berth.ray.rollout import Wanted
    from berth.ray.serve_config import ServeOptions, berth_apps

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)

EMPTY = {"strategy": "pack", "slots": [], "berths": []}


def wanted_from(plan: Plan, params: dict) -> Wanted:
    """The rollout's aim from the module's options."""
    options = load(ServeOptions, params["options"], "serve options")
    apps = load_apps(params["apps"])
    capacity = {slot.name: slot.vram_mib * len(slot.gpu_uuids) for slot in plan.slots}
    prefix = {app.name: app.prefix_affinity for app in apps}
    least = {app.name: app.min_available for app in apps if app.min_available is not None}
    # What reads prompts for another model is nothing to ask for; the gateway hears of it with its first berth.
    models = sorted(set(plan.deployments) - {app.name for app in apps if app.prefill_of})
    return Wanted(berth_apps(plan, apps, options), models, capacity, options, prefix, least)


def rehearsal(client: RayClient, wanted: Wanted) -> dict:
    """Check mode: the steps from Serve's present state; from nothing where Ray does not run yet."""
    try:
        serve = client.serve()
    except Refused:
        serve = {}
    steps = [step.why for step in rehearse(serve, wanted)]
    diff = {"prepared": "\n".join(steps) + "\n"} if steps else {}
    return {
        "changed": bool(steps),
        "kind": "done",
        "text": "; ".join(steps) or "as planned",
        "steps": steps,
        "diff": diff,
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "token_file": {"type": "path", "default": "", "no_log": False},
            "plan": {"type": "dict"},
            "apps": {"type": "list", "elements": "dict", "default": []},
            "options": {"type": "dict", "required": True},
            "timeout_s": {"type": "int", "default": 900},
            "slot_timeout_s": {"type": "int", "default": 120},
            "expected_start_s": {"type": "int", "default": 60},
            "known": {"type": "str", "default": ""},
            "watch_s": {"type": "float", "default": 0.0},
            "phase": {"choices": ["first", "next", "why"], "default": "first"},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    params = module.params
    try:
        plan = load(Plan, params["plan"] or EMPTY, "plan")
        wanted = wanted_from(plan, params)
        token = "" if module.check_mode and not params["token_file"] else read_token(params["token_file"])
        client = RayClient(params["address"], token)
        if module.check_mode:
            module.exit_json(**rehearsal(client, wanted))
        if params["phase"] == "why":
            module.exit_json(changed=False, kind="wait", text=stuck(client), steps=[])
        retry_failed = params["phase"] == "first"
        outcome = watch(client, plan, wanted, retry_failed, params["known"], params["watch_s"])
    except BerthError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=outcome.changed,
        kind=outcome.kind,
        text=outcome.text,
        down=list(outcome.down),
        joining=outcome.joining,
        steps=[outcome.text],
    )


if __name__ == "__main__":
    main()
