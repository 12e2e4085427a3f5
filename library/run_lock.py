#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""One playbook run at a time."""

from __future__ import annotations

from pathlib import Path

DOCUMENTATION = r"""
module: run_lock
short_description: Let one playbook run at a time work on a cluster
description:
  - Writes the pid and start time of the running C(ansible-playbook) into a file. A lock whose process is gone
    is taken over.
  - Run it on the controller, first and last in a playbook.
options:
  path:
    description: The lock file.
    type: path
    required: true
  state:
    description: Take or give back.
    choices:
      - acquired
      - released
    default: acquired
    type: str
  what:
    description: What the run is, for the message another run gets.
    type: str
    default: ansible-playbook
attributes:
  check_mode:
    support: full
    description: Refuses beside a live run but writes nothing.
  diff_mode:
    support: none
    description: A lock is no state of the host.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Take the lock
  run_lock: {path: .berth/local/lock, what: site.yml}
"""

RETURN = r"""
taken_over:
  description: The dead holder whose lock was taken over.
  type: dict
  returned: when there was one
  sample:
    pid: 123
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from dataclasses import asdict

    from berth.errors import BerthError
    from berth.host import run_lock

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"choices": ["acquired", "released"], "default": "acquired"},
            "what": {"type": "str", "default": "ansible-playbook"},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"the controller's Python has no berth ({IMPORT_ERROR}); run: make setup")
    path, holder = Path(module.params["path"]), run_lock.playbook_process()
    try:
        if module.check_mode:
            run_lock.refuse_beside(run_lock.read(path), holder)
            module.exit_json(changed=False)
        if module.params["state"] == "released":
            run_lock.release(path, holder)
            module.exit_json(changed=False)
        stale = run_lock.acquire(path, holder, module.params["what"])
    except BerthError as error:
        module.fail_json(msg=str(error))
    if stale:
        module.warn(f"took over the lock of pid {stale.pid} ({stale.what}, since {stale.since}), which is gone")
    # The lock lives as long as the run: a run that only took it changed nothing.
    module.exit_json(changed=False, **({"taken_over": asdict(stale)} if stale else {}))


if __name__ == "__main__":
    main()
