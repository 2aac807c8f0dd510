"""The day that chat templates write. Tokens must not depend on the day on which they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import Any, Final
from unittest import mock

DAY: Final = "01 Jan 2025"
"""What templates get as `date_string`."""

_NOW: Final = "strftime_now"
"""The function with which templates ask for today. It is transformers' own, so no rendering can pass another one."""


class _Fixed(datetime):
    """Time that stands still at the beginning of `DAY`."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Fixed:
        return cls(2025, 1, 1, tzinfo=tz)


@contextmanager
def fixed_day() -> Iterator[None]:
    """Within it, templates that ask for today get `DAY`."""
    from transformers.utils import chat_template_utils

    with mock.patch.object(chat_template_utils, "datetime", _Fixed):
        yield


def asks_for_today(template: Any) -> bool:
    """Whether a chat template, or one of several by name, asks for today.

    >>> asks_for_today("{{ strftime_now('%d %b %Y') }}")
    True
    """
    return _NOW in str(template)
