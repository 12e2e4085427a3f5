"""Runs the module of this name with the controller's clock read around it; never fails, because no answer is one, too.

A host that cannot be reached, or on which no module can run, is one more entry of the one list.
"""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

SYSTEM = "cat /etc/os-release"


class ActionModule(ActionBase):
    """See library/preflight_facts.py for the options."""

    _supports_check_mode = True

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        before = time.time()
        try:
            answer: dict[str, Any] = self._execute_module(module_name="preflight_facts", task_vars=task_vars)
        # No connection, no temporary directory, no way to become root: each has its own exception below this one.
        except AnsibleError as error:
            return result | {"changed": False, "why_not": str(error)}
        times = {"changed": False, "before": before, "after": time.time()}
        if "preflight" in answer:
            return result | times | {"preflight": answer["preflight"]}
        return result | times | {"why_not": _why(answer), "os_release": self._system()}

    def _system(self) -> str:
        """No Python, or one too old for a module: the system's name may say why. Asked without becoming root."""
        try:
            shell = self._low_level_execute_command(SYSTEM, sudoable=False)
        except AnsibleError:
            return ""
        return str(shell.get("stdout", "")) if shell.get("rc") == 0 else ""


def _why(answer: dict[str, Any]) -> str:
    parts = [str(answer[key]).strip() for key in ("msg", "module_stderr", "module_stdout") if answer.get(key)]
    return " ".join(parts)[:600]
