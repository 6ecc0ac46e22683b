"""`python -m aapt` is the command `aapt`; torchrun starts it so."""

import sys

from .commands.app import main

if __name__ == "__main__":
    sys.exit(main())
