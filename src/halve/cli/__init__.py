"""The command `halve`."""

from halve.cli.app import main

__all__ = ["main"]
