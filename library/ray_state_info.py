#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ray's own state, read over REST."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ray_state_info
short_description: Nodes, apps, deployments and replicas as Ray tells them
description:
  - Run it where the dashboard's address can be reached (on the head, when it binds to loopback).
  - A Ray that does not answer is no failure of the module; C(ray_state.unreachable) says why.
options:
  address:
    description: The dashboard, http://host:port.
    type: str
    required: true
  token_file:
    description: File with Ray's token.
    type: path
    default: ''
  timeout_s:
    description: Seconds to wait for an answer.
    type: float
    default: 30
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
- name: Ask Ray
  ray_state_info: {address: "http://127.0.0.1:8275", token_file: /etc/berth/ray-token}
  register: ray
"""

RETURN = r"""
ray_state:
  description: See berth.ray.types.RayState.
  type: dict
  returned: always
  sample:
    nodes: []
    apps: []
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.codec import dump
    from berth.errors import BerthError
    from berth.ray.client import RayClient, read_token
    from berth.ray.state import read_state
    from berth.ray.types import RayState

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "token_file": {"type": "path", "default": "", "no_log": False},
            "timeout_s": {"type": "float", "default": 30.0},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    params = module.params
    try:
        token = read_token(params["token_file"]) if params["token_file"] else ""
        state = read_state(RayClient(params["address"], token, params["timeout_s"]))
    except BerthError as error:
        state = RayState(unreachable=str(error))
    module.exit_json(changed=False, ray_state=dump(state))


if __name__ == "__main__":
    main()
