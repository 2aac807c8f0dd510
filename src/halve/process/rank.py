"""Which of the processes of one command is this?

torchrun and Slurm start the same command several times and number the processes.
"""

from __future__ import annotations

import os


def leads() -> bool:
    """Whether this process is the first. Only the first one prints, and reads what needs to be read only once."""
    return os.environ.get("RANK", "0") == "0"
