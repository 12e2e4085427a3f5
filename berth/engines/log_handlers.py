"""Importing vLLM without losing Serve's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Hide the process's log handlers from whatever configures logging inside the block.

    vLLM calls ``logging.config.dictConfig`` when it is imported, and that closes every handler there is (CPython,
    ``logging.config._clearExistingHandlers``), Serve's too. The replica would log nothing from then on, and Serve's
    controller, when it comes back after a restart, would find the closed handler, take the replica for broken and
    restart it (Ray 2.60, ``get_component_logger_file_path``).
    """
    listed, named = logging._handlerList[:], dict(logging._handlers)  # type: ignore[attr-defined]
    logging._handlerList.clear()  # type: ignore[attr-defined]
    logging._handlers.clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging._handlerList[:0] = listed  # type: ignore[attr-defined]
        logging._handlers.update(named)  # type: ignore[attr-defined]
