"""The command `aapt`, also as `python -m aapt`; torchrun starts it so."""

import signal
import sys


def main() -> int:
    """Run the command and return its exit code. Ctrl-C at any time ends in one line or none."""
    try:
        from .commands.app import main

        code = main()
    except KeyboardInterrupt:  # while modules load, or a second one while the first is handled
        if sys.stderr is not None:
            print("aapt: interrupted", file=sys.stderr)
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends: no traceback of its own
    # `python -m` ends by SIGINT, without the code, if Ctrl-C came within an `exec` of text, such as
    # that of a dataclass while modules load. The next `exec` forgets it.
    exec("")
    return code


if __name__ == "__main__":
    sys.exit(main())
