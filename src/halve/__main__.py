"""`python -m halve`, as torchrun starts it."""

import sys

from halve.cli import main

if __name__ == "__main__":
    sys.exit(main())
