"""Standard streams that are closed, full, or whose reader has left."""

import contextlib
import os
import sys


def open_closed_streams() -> None:
    """Open the null device in place of each standard stream that the process began without.

    The next file that is opened would take the free number 0, 1 or 2, and messages would be written
    into it. `sys.stdout` stays None if it is: print is then silent, and a command whose result is
    standard output can refuse. `sys.stderr` gets a stream, because print takes None for standard
    output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)


def discard_unwritten() -> None:
    """Drop what a standard stream holds but cannot write: Python would fail on it at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), stream.fileno())
                stream.flush()
