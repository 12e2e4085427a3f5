"""Starts the model_prefetch module's download and shows how far it is until it is through."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from berth.host.hub import progress_lines

POLL_S = 5.0

display = Display()


class ActionModule(ActionBase):
    """See library/model_prefetch.py for the options."""

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        begun = self._pass(args, "first", task_vars)
        if begun.get("failed") or begun["state"] == "done":
            return result | begun
        host = (task_vars or {}).get("inventory_hostname", "")
        answer, earlier, then = begun, {}, time.monotonic()
        while answer["state"] == "running":
            time.sleep(POLL_S)
            answer = self._pass(args, "next", task_vars)
            if answer.get("failed"):
                return result | answer | {"changed": True}
            now = time.monotonic()
            done = {model["repo"]: int(model["done"]) for model in answer["models"]}
            rates = {
                repo: (size - earlier[repo]) / (now - then)
                for repo, size in done.items()
                if size > earlier.get(repo, size)
            }
            for line in progress_lines(answer["models"], rates) if done != earlier else []:
                display.display(f"  {host}  {line}")
            earlier, then = done, now
        if begun.get("attached"):
            return self.run(tmp, task_vars)
        return result | begun | {"state": "done", "models": answer["models"]}

    def _pass(self, args: dict[str, Any], phase: str, task_vars: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="model_prefetch", module_args=args | {"phase": phase}, task_vars=task_vars
        )
        answer.pop("invocation", None)
        return answer
