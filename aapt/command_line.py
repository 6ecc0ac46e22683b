"""What the commands share: options, and how they speak of what went wrong."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class InputError(Exception):
    """What a command found wrong with its input, beyond what typer checks."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turn the ValueErrors of what reads the user's input into exit code 2."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def say(line: str) -> None:
    print(line, file=sys.stderr)
