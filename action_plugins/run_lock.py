"""Runs the module of the action's name in the controller's own process.

For modules that work on the controller alone: a process of their own would spend most of its time on starting Python
and on imports that this one has done. The other names in this directory that have no file of their own are links here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.module_utils import basic
from ansible.module_utils.common.json import Direction, get_module_decoder, get_module_encoder
from ansible.plugins.action import ActionBase

# Ansible reads this file before it forks, so that every task finds these imported.
import berth.preflight.report
import berth.verify.compare  # noqa: F401

PROFILE = "legacy"
"""How ansible-core 2.19 writes arguments and answers of modules of our kind."""
LIBRARY = Path(__file__).resolve().parents[1] / "library"


class ActionModule(ActionBase):
    """See the module's own options."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        name = self._task.action.rpartition(".")[2]
        arguments = dict(self._task.args)
        self._update_module_args(name, arguments, task_vars)
        return result | _run(name, arguments)


def _run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the module prints, as Ansible's own runner would read it; the process is a task's own, forked for it."""
    spec = importlib.util.spec_from_file_location(f"berth_library_{name}", LIBRARY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder = get_module_encoder(PROFILE, Direction.CONTROLLER_TO_MODULE)
    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}, cls=encoder).encode()
    basic._ANSIBLE_PROFILE = PROFILE
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main()
    try:
        answer: dict[str, Any] = json.loads(
            printed.getvalue(), cls=get_module_decoder(PROFILE, Direction.MODULE_TO_CONTROLLER)
        )
    except ValueError as error:
        raise AnsibleActionFail(f"module {name} answered {printed.getvalue()[:500]!r}: {error}") from None
    return answer
