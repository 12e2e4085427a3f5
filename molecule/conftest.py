"""Fixtures of every scenario's tests; the journal of the host whose test failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import JOURNAL_LINES, Lab, name_of


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """The journal of Berth's units on the host whose test failed."""
    outcome: Any = yield
    report = outcome.get_result()
    host = getattr(item, "funcargs", {}).get("host")
    if report.when == "call" and report.failed and host is not None:
        journal = host.run(f"journalctl --no-pager --lines={JOURNAL_LINES} --unit='berth-*'")
        report.sections.append((f"journal of {name_of(host)}", journal.stdout + journal.stderr))
