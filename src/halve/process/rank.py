"""Which of the processes of one command is this?

torchrun and Slurm start the same command several times and number the processes.
"""

from __future__ import annotations

import os


def leads() -> bool:
    """Whether this process is the first: it alone speaks, and it alone reads what one reading is enough for."""
    return os.environ.get("RANK", "0") == "0"
