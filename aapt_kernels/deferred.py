"""Implementations whose module is imported when they first run: Triton is an optional dependency,
and slow to import for those who stay on a CPU."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec


def deferred(package: str, function: str = "forward") -> Callable | None:
    """`function` of the op's `triton_kernels.py`, as `implement(op, triton=deferred(__name__))`
    wants it; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None

    def run(*arguments):
        return getattr(import_module(f"{package}.triton_kernels"), function)(*arguments)

    return run
