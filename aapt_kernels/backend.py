"""Which implementation of an op runs: one table, resolved by name, visible in `backends()`.

`auto` takes, on a CUDA device, the sm_90a kernel, else the Triton kernel, else plain PyTorch; on
the CPU the fast PyTorch composition. A backend that was asked for by name never falls back.

Two more take CPU tensors, run kernels where there is no device, and only by name: `sim`, the
sm_90a sources on a simulated device (development builds), and `triton` under its interpreter.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library as native

NAMES = ("auto", "cuda", "triton", "cpu", "reference", "sim")
SM90 = {"cuda": "aapt_sm90", "sim": "aapt_sim"}  # namespaces of the hand-written kernels
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_library = torch.library.Library("aapt", "FRAGMENT")
_implementations: dict[str, dict[str, Callable]] = {}
_limits: dict[str, dict[str, Callable[..., str | None]]] = {}
_forced = "auto"


class BackendError(RuntimeError):
    """A backend that was asked for cannot run; the message says why."""


class Choice(NamedTuple):
    """One row of `backends()`: what `auto` runs, and why nothing it prefers to that."""

    op: str
    device: str
    backend: str
    reason: str


def implement(
    op: str,
    *,
    limits: dict[str, Callable[..., str | None]] | None = None,
    **implementations: Callable,
) -> None:
    """Give the schema `aapt::<op>` its implementations, by backend name. Each takes the schema's
    arguments. The sm_90a kernels are not named here: they are `torch.ops.aapt_sm90.<op>`. One that
    does not take the schema's arguments is called by `sm90`, which gets the namespace before them.

    `limits`: by backend, why it does not take these arguments; None if it does.
    """
    _implementations[op] = implementations
    _limits[op] = limits or {}

    def dispatch(*args):
        return resolve(op, *args)(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(op, dispatch, key)


def deferred(package: str, function: str = "forward") -> Callable | None:
    """`function` of the op's `triton_kernels.py`, as `implement(op, triton=deferred(__name__))`
    wants it; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None

    def run(*arguments):
        return getattr(import_module(f"{package}.triton_kernels"), function)(*arguments)

    return run


def register_fake(op: str) -> Callable:
    """Decorator: the shapes and dtypes that `aapt::<op>` returns."""
    return torch.library.register_fake(f"aapt::{op}", lib=_library)


def register_autograd(op: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(
        f"aapt::{op}", backward, setup_context=setup_context, lib=_library
    )


def resolve(op: str, tensor: Tensor, *rest) -> Callable:
    """The implementation that runs `op` on these arguments, or BackendError."""
    return implementation(op, choose(op, tensor, *rest))


def choose(op: str, tensor: Tensor, *rest) -> str:
    """The backend that runs `op` on these arguments, or BackendError; without `rest`, on some
    arguments of which `tensor` is the first."""
    device = tensor.device.type
    reasons = []
    for name in PREFERENCE.get(device, ()) if _forced == "auto" else (_forced,):
        limit = _limits[op].get("cuda" if name == "sim" else name, _no_limit)
        reason = obstacle(op, name, device) or limit(tensor, *rest)
        if not reason:
            return name
        reasons.append(f"backend '{name}' cannot run {op} on a {device} tensor: {reason}")
    raise BackendError("; ".join(reasons) or f"no backend runs {op} on a {device} tensor")


def _no_limit(tensor: Tensor, *rest) -> None:
    return None


def implementation(op: str, name: str) -> Callable | None:
    """The function behind one cell of the table, None where nobody has written it."""
    if name not in SM90:
        return _implementations[op].get(name)
    kernels = getattr(torch.ops, SM90[name])
    kernel, caller = getattr(kernels, op, None), _implementations[op].get("sm90")
    return partial(caller, kernels) if kernel and caller else kernel


def obstacle(op: str, name: str, device: str) -> str | None:
    """Why this backend cannot run this op on this kind of device; None if it can."""
    if reason := unavailable(name):
        return reason
    if device != takes(name, device):
        return f"it takes {takes(name, device).upper()} tensors"
    if implementation(op, name) is None:
        return "no kernel for this op yet"
    return None


def takes(name: str, device: str) -> str:
    """The kind of device whose tensors this backend takes: this one, where it takes any."""
    if name == "triton":
        return "cpu" if interpreted() else "cuda"
    return {"cuda": "cuda", "cpu": "cpu", "sim": "cpu"}.get(name, device)


def unavailable(name: str) -> str | None:
    """Why this backend can run nothing at all here; None if it can."""
    if name == "cuda":
        return no_sm90()
    if name == "triton" and find_spec("triton") is None:
        return "Triton is not installed"
    if name == "triton" and not interpreted() and not torch.cuda.is_available():
        return "no CUDA device"
    if name == "sim":
        return no_sim()
    return None


def interpreted() -> bool:
    """Whether Triton kernels run under Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_sm90() -> str | None:
    """Why no sm_90a kernel can run here at all; None if one can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"the device is not sm_90 but {torch.cuda.get_device_capability()}"
    if not any(implementation(op, "cuda") for op in _implementations):
        return "the library was built without sm_90a kernels"
    return None


def no_sim() -> str | None:
    """Why the sm_90a kernels cannot be simulated here; None if they can."""
    return native.no_simulator()


class use_backend:
    """Choose the backend of every op: `use_backend("reference")`, or as a context manager that
    restores what was chosen before. Names: auto, cuda, triton, cpu, reference; to run kernels
    without a device sim, and triton with TRITON_INTERPRET=1 in the environment.

    The choice is global and holds for the backward pass too. ValueError for another name;
    BackendError, here or at the op, where the backend cannot run.
    """

    def __init__(self, name: str):
        global _forced
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
        if reason := unavailable(name):
            raise BackendError(f"backend '{name}' cannot run: {reason}")
        self._before = _forced
        _forced = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *error) -> None:
        global _forced
        _forced = self._before


def backends() -> list[Choice]:
    """What `auto` runs for each op on the CPU and, if there is one, on the CUDA device."""
    rows = []
    for op in sorted(_implementations):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = []
            for name in PREFERENCE[device]:
                reason = obstacle(op, name, device)
                if not reason:
                    rows.append(Choice(op, device, name, "; ".join(reasons)))
                    break
                reasons.append(f"{name}: {reason}")
    return rows
