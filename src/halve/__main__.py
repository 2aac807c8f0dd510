"""The program `halve`, also as `python -m halve`, which is how torchrun starts it."""

import sys

from halve.process import fresh, interrupts, spins


def main() -> int:
    """Run the command line in a process that finds no code in the working folder."""
    fresh.shut_program()
    spins.shorten()
    try:
        from halve.cli.app import main as command
    except KeyboardInterrupt:
        print(interrupts.farewell(interrupts.INTERRUPTED, sys.argv[1:]), file=sys.stderr)
        return interrupts.INTERRUPTED
    return command()


if __name__ == "__main__":
    sys.exit(main())
