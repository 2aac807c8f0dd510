"""The time that a case may take: a busy machine shares its cores among many."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def limit() -> float:
    """Seconds for one call; sound worlds take one or two."""
    return 60.0
