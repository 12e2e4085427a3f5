#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Refuse ports that somebody else has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: port_check
short_description: Fail when a port is taken by anybody but this cluster
description:
  - Reads which process listens on each port, and fails with its pid and command where it is not one of the cluster's.
  - Fails as well where two variables name the same port. Changes nothing.
options:
  ports:
    description: Variable name to port.
    type: dict
    required: true
  cluster:
    description: The cluster's id; its own listeners are fine.
    type: str
    required: true
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
- name: Refuse ports that are taken
  port_check: {cluster: local-1a2b, ports: {serve_apps_http_port: 8000}}
"""

RETURN = r"""
taken:
  description: The ports in use by others.
  type: list
  elements: dict
  returned: always
  sample: []
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from dataclasses import asdict

    from berth.host.ports import ports_in_use

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={"ports": {"type": "dict", "required": True}, "cluster": {"type": "str", "required": True}},
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    ports = {name: int(port) for name, port in module.params["ports"].items() if int(port)}
    twice = sorted(port for port in set(ports.values()) if list(ports.values()).count(port) > 1)
    if twice:
        names = ", ".join(f"{name}={port}" for name, port in sorted(ports.items()) if port in twice)
        module.fail_json(msg=f"two variables name the same port: {names}; mend: set them apart")
    taken = ports_in_use(ports, module.params["cluster"])
    lines = [
        f"{item.name}={item.port} is taken by {f'pid {item.pid} ({item.command})' if item.pid else 'another process'}"
        for item in taken
    ]
    if taken:
        module.fail_json(
            msg=f"{'; '.join(lines)}. mend: end that process, or set the variable to a free port",
            taken=[asdict(item) for item in taken],
        )
    module.exit_json(changed=False, taken=[])


if __name__ == "__main__":
    main()
