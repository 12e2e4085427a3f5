"""Prints text for people as it is: lines of a map keep their columns, colours go only to terminals."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()


class ActionModule(ActionBase):
    """Option ``text``: a string or a list of lines."""

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        text = self._task.args.get("text", "")
        lines = text.splitlines() if isinstance(text, str) else [str(line) for line in text]
        display.display("\n".join(["", *lines, ""]))
        return result | {"changed": False}
