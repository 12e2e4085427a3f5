"""Repeats the serve_application module's passes until the plan runs, and shows each step as it happens."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from berth.ray.patience import Patience

WATCH_S = 15.0
"""How long one pass may look on; Ctrl-C and ``serve_apps_timeout_s`` are heard in between."""
SETTLE_S = 2.0
"""After a change: Serve's controller takes a moment before its status shows it."""

display = Display()


class ActionModule(ActionBase):
    """See library/serve_application.py for the options."""

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        if self._task.check_mode:
            return result | self._pass(args, "first", task_vars)
        return result | self._roll_out(args, task_vars)

    def _roll_out(self, args: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        started, steps, shown = time.monotonic(), [], ""
        patience = Patience(int(args.get("timeout_s", 900)), int(args.get("slot_timeout_s", 120)))
        phase, elapsed = "first", 0.0
        while True:
            watch_s = min(WATCH_S, patience.left_s(elapsed))
            answer = self._pass(args | {"known": shown, "watch_s": watch_s}, phase, task_vars)
            if answer.get("failed"):
                return answer | {"changed": bool(steps), "steps": steps}
            elapsed = time.monotonic() - started
            if answer["kind"] == "done":
                return {
                    "changed": bool(steps),
                    "steps": steps,
                    "kind": "done",
                    "text": answer["text"],
                    "elapsed_s": round(elapsed),
                }
            if answer["kind"] == "put":
                phase = "next"
                steps.append(answer["text"])
            if answer["text"] != shown:
                shown = answer["text"]
                self._show(answer, elapsed, args)
            if patience.is_out(elapsed, answer.get("joining", False)):
                return self._give_up(args, answer, steps, task_vars)
            if answer["kind"] == "put":
                time.sleep(SETTLE_S)

    def _pass(self, args: dict[str, Any], phase: str, task_vars: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="serve_application", module_args=args | {"phase": phase}, task_vars=task_vars
        )
        answer.pop("invocation", None)
        return answer

    def _show(self, answer: dict[str, Any], elapsed: float, args: dict[str, Any]) -> None:
        verb = "waiting for " if answer["kind"] == "wait" else ""
        display.display(f"  {elapsed:4.0f} s  {verb}{answer['text']}")
        if answer.get("down"):
            seconds = args.get("expected_start_s", 60)
            display.display(
                f"          {', '.join(answer['down'])} will answer 503 until this is through, about {seconds} s "
                "(serve_apps_expected_start_s)",
                color="yellow",
            )

    def _give_up(
        self, args: dict[str, Any], answer: dict[str, Any], steps: list[str], task_vars: Any
    ) -> dict[str, Any]:
        why = self._pass(args, "why", task_vars)
        return {
            "failed": True,
            "changed": bool(steps),
            "steps": steps,
            "msg": (
                f"gave up waiting for {answer['text']}; serve_apps_timeout_s and serve_apps_slot_timeout_s set how "
                f"long. "
                f"{why.get('text') or why.get('msg') or ''}"
            ),
        }
