"""A server that answers in the place of a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stub_server import StubServer, serving


@pytest.fixture
def server() -> Iterator[StubServer]:
    with serving() as made:
        yield made
