"""Runs the module of this name with the controller's clock read around it; asks a plain shell where it cannot run."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase

SYSTEM = "cat /etc/os-release"


class ActionModule(ActionBase):
    """See library/preflight_facts.py for the options."""

    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        before = time.time()
        answer: dict[str, Any] = self._execute_module(module_name="preflight_facts", task_vars=task_vars)
        answer.pop("invocation", None)
        answer |= {"before": before, "after": time.time()}
        if answer.get("failed"):
            # No Python, or one too old for a module: the system's name may say why.
            shell = self._low_level_execute_command(SYSTEM)
            answer["os_release"] = shell.get("stdout", "") if shell.get("rc") == 0 else ""
        return result | answer
