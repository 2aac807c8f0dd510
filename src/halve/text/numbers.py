"""The number that a text ends with, as GSM8K's verifier reads it."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or the first one behind ####, if it has this mark (GSM8K, 2110.14168).

    >>> last_number("6 * 7 = 42 and not 7 #### 1,042.0 of 9")
    Decimal('1042.0')
    """
    _, marked, behind = text.rpartition(_MARK)
    numbers = _NUMBER.findall(behind if marked else text)
    try:
        return Decimal(numbers[0 if marked else -1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None
