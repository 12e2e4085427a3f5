#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module host_look: a thin shim over berth.host.look and berth.host.environment."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: host_look
short_description: What of a host is as it must be already
description:
  - One look at files, directories, a user and a virtual environment, so that tasks with nothing to do need not ask each
    for itself.
  - Changes nothing.
options:
  paths:
    description: Files and directories to look at.
    type: list
    elements: path
    required: true
  user:
    description: A user to look for.
    type: str
    default: ""
  environment:
    description: A virtual environment to scan, as M(python_environment_info) does; left out, none is.
    type: dict
    suboptions:
      path:
        description: The environment.
        type: path
        required: true
      lock:
        description: Text of the lock that it belongs to.
        type: str
        required: true
  gpu_sim:
    description: A simulated driver to compare with, as M(gpu_sim) would make it; left out, none is looked at.
    type: dict
    suboptions:
      directory:
        description: Where it lives on the host.
        type: path
        required: true
      profile:
        description: A profile file on the host, or the name of one that comes with Berth.
        type: str
        required: true
      seed:
        description: UUIDs that the profile leaves out follow from it.
        type: str
        required: true
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
- name: Look at what is there already
  host_look:
    paths: [/etc/berth, /etc/berth/head.json]
    user: berth
"""

RETURN = r"""
paths:
  description: What is at each path; none where nothing is.
  returned: always
  type: dict
  sample: {/etc/berth: {kind: directory, mode: "0755", owner: root, sha1: ""}}
user:
  description: The user's home and shell; none where there is no such user.
  returned: always
  type: dict
  sample: {home: /var/lib/berth/home, shell: /usr/sbin/nologin}
environment:
  description: What M(python_environment_info) returns; empty where it was not asked for.
  returned: always
  type: dict
gpu_sim:
  description: Whether the simulated driver is there as asked, so that M(gpu_sim) would change nothing.
  returned: always
  type: bool
"""

from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from dataclasses import asdict

    from berth.errors import BerthError
    from berth.gpu.sim import build
    from berth.host import look
    from berth.host.environment import describe

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "required": True},
            "user": {"type": "str", "default": ""},
            "environment": {
                "type": "dict",
                "options": {
                    "path": {"type": "path", "required": True},
                    "lock": {"type": "str", "required": True},
                },
            },
            "gpu_sim": {
                "type": "dict",
                "options": {
                    "directory": {"type": "path", "required": True},
                    "profile": {"type": "str", "required": True},
                    "seed": {"type": "str", "required": True},
                },
            },
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    params = module.params
    asked, sim = params["environment"], params["gpu_sim"]
    try:
        module.exit_json(
            changed=False,
            paths={path: asdict(seen) if seen else None for path, seen in look.look(params["paths"]).items()},
            user=look.user(params["user"]) if params["user"] else None,
            environment=describe(Path(asked["path"]), asked["lock"]) if asked else {},
            gpu_sim=build.is_as_wanted(Path(sim["directory"]), sim["profile"], sim["seed"]) if sim else False,
        )
    except BerthError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
