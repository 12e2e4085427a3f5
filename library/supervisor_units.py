#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Berth's supervisord and its units."""

from __future__ import annotations

DOCUMENTATION = r"""
module: supervisor_units
short_description: Run Berth's units under its own supervisord
description:
  - Starts the daemon when it does not answer, then makes its units what the configuration files say.
  - Only units whose configuration changed are restarted; units taken out are stopped.
options:
  binary:
    description: supervisord.
    type: path
    required: true
  config:
    description: Its configuration file.
    type: path
    required: true
  socket:
    description: Its control socket.
    type: path
    required: true
  cluster:
    description: The cluster's id, carried by every process in BERTH_CLUSTER.
    type: str
    required: true
  state:
    description: Running, or stopped with everything of the cluster on this host.
    choices:
      - started
      - stopped
    default: started
    type: str
attributes:
  check_mode:
    support: full
    description: Says what would be started, restarted, stopped.
  diff_mode:
    support: full
    description: One line per unit.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Run the units
  supervisor_units:
    binary: /opt/berth/bin/supervisord
    config: /run/berth/supervisord.conf
    socket: /run/berth/supervisor.sock
    cluster: local-1a2b
"""

RETURN = r"""
units:
  description: One line for each unit touched.
  type: list
  elements: str
  returned: always
  sample:
    - 'berth-ray-head: started'
restarted:
  description: Slots whose unit is restarted; what runs there goes down meanwhile.
  type: list
  elements: str
  returned: always
  sample:
    - gpu01-0
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.errors import BerthError
    from berth.host import supervisor
    from berth.host.processes import own_processes

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def start(daemon: supervisor.Daemon, check: bool) -> list[str]:
    """Lines for what was (or would be) done."""
    if check and not daemon.running():
        return ["supervisord: started, with every unit"]
    if check:
        todo = supervisor.pending(daemon)
        return [f"{name}: {supervisor.VERBS[state]}" for state, names in todo.items() for name in names]
    lines = ["supervisord: started"] if supervisor.start(daemon) else []
    return lines + supervisor.apply(daemon)


def stop(daemon: supervisor.Daemon, check: bool) -> list[str]:
    """Lines for what was (or would be) stopped."""
    lines = [f"pid {item.pid} ({item.unit or 'supervisord'}): stopped" for item in own_processes(daemon.cluster)]
    if lines and not check:
        supervisor.stop(daemon)
    return lines


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "binary": {"type": "path", "required": True},
            "config": {"type": "path", "required": True},
            "socket": {"type": "path", "required": True},
            "cluster": {"type": "str", "required": True},
            "state": {"choices": ["started", "stopped"], "default": "started"},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    params = module.params
    daemon = supervisor.Daemon(params["binary"], params["config"], params["socket"], params["cluster"])
    try:
        act = start if params["state"] == "started" else stop
        lines = act(daemon, module.check_mode)
    except BerthError as error:
        module.fail_json(msg=str(error))
    restarted = [
        line.partition(":")[0].partition("@")[2] for line in lines if line.endswith(": restarted") and "@" in line
    ]
    module.exit_json(
        changed=bool(lines),
        units=lines,
        restarted=restarted,
        diff={"prepared": "\n".join(lines) + "\n"} if lines else {},
    )


if __name__ == "__main__":
    main()
