"""How long PyTorch's threads spin while they wait for each other.

PyTorch divides a product among the CPU cores, and who is done first spins until the others are. GNU's OpenMP spins
300,000 times, a millisecond or so. If another program has one of the cores, the thread that is waited for does not run,
and all the others spin instead of letting it. With two cores and two other programs a training step then takes seven
times as long as on an idle machine. After fewer turns a thread sleeps until it is woken.
"""

from __future__ import annotations

import os
from typing import Final

TURNS: Final = 3_000
"""On an idle machine trainings are as fast as before (decision 0036)."""
_SPINS, _POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


def shorten() -> None:
    """Let threads spin less, from the first import of PyTorch on; what the user has set stays.

    Other OpenMP libraries than GNU's, as on macOS, do not read this.
    """
    if _SPINS not in os.environ and _POLICY not in os.environ:
        os.environ[_SPINS] = str(TURNS)
