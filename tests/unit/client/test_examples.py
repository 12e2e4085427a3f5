"""The examples of docs/api.md; tests/unit/engines/test_gateway.py runs them against the gateway."""

from __future__ import annotations

from tests.unit.client import examples
from tests.unit.client.fake_api import running


def test_the_examples_work_as_written() -> None:
    with running() as api:
        examples.expected(examples.run(api.url))
    assert api.keys == {"none"}
