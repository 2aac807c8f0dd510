"""The sentence splitter that ifeval's instructions count with, without the harness's download.

NLTK's Punkt reads four tables. Where the machine has none of its own, it finds those in `nltk_data` beside this file:
English abbreviations, and common words that begin with a capital only where a sentence begins. They are halve's own.
With them the verdicts on GPT-4's stored answers are those of IFEval's authors (benchmarks/ifeval_verdicts.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DATA = str(Path(__file__).parent / "nltk_data")


@contextmanager
def splitter_at_hand() -> Iterator[None]:
    """In this context NLTK finds a sentence splitter: the machine's own, or the one of this package.

    It takes seconds to load, so it is left to those who need it.
    """
    nltk = sys.modules.get("nltk")
    before = os.environ.get("NLTK_DATA")
    if nltk is None:
        os.environ["NLTK_DATA"] = _DATA if before is None else f"{before}{os.pathsep}{_DATA}"
    elif _DATA not in nltk.data.path:
        nltk.data.path.append(_DATA)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("NLTK_DATA", None)
        else:
            os.environ["NLTK_DATA"] = before
