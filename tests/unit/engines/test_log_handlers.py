"""What vLLM's import does to logging, and that it no longer does."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from collections.abc import Iterator

import pytest

from berth.engines.log_handlers import handlers_kept

CONFIG = {"version": 1, "disable_existing_loggers": False}


@pytest.fixture
def serve_handler() -> Iterator[logging.handlers.MemoryHandler]:
    """A handler as Serve makes one for a replica."""
    with handlers_kept():  # pytest's own handlers must outlive dictConfig
        yield logging.handlers.MemoryHandler(10, target=logging.NullHandler())


def test_dict_config_closes_handlers(serve_handler: logging.handlers.MemoryHandler) -> None:
    logging.config.dictConfig(CONFIG)
    assert serve_handler.target is None


def test_kept_handlers_stay_open(serve_handler: logging.handlers.MemoryHandler) -> None:
    with handlers_kept():
        logging.config.dictConfig(CONFIG)
    assert serve_handler.target is not None
    assert any(entry() is serve_handler for entry in logging._handlerList)  # type: ignore[attr-defined]
