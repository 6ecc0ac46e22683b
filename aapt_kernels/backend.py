"""Choice of the implementation that runs an op: one table, resolved by name, shown by `backends()`.

`auto` chooses for each call, by the first tensor's device and by what each backend takes: on a CUDA
device the sm_90a kernel, else the Triton kernel, else plain PyTorch; on the CPU the fast PyTorch
composition. A backend forced by name never falls back.

Two more backends take CPU tensors, run kernels where there is no device, and only by name: `sim`,
the sm_90a sources on a simulated device (development builds), and `triton` under its interpreter.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library as native
from .checks import aligned
from .precision import autocasts
from .schemas import NAMESPACE, library

NAMES = ("auto", "cuda", "triton", "cpu", "reference", "sim")
# Namespaces of the hand-written kernels
SM90 = {"cuda": f"{NAMESPACE}_sm90", "sim": f"{NAMESPACE}_sim"}
TRITON_CAPABILITY = (8, 0)  # the first that multiplies bfloat16 and TF32
DRIVERS = {12: "525", 13: "580"}  # the first driver of each major version of CUDA
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_implementations: dict[str, dict[str, Callable]] = {}
_limits: dict[str, dict[str, Callable[..., str | None]]] = {}
_forced = "auto"


class BackendError(RuntimeError):
    """A backend that was forced cannot run; the message says why."""


class Choice(NamedTuple):
    """Row of `backends()`: what `auto` runs, and why nothing it prefers to that."""

    op: str
    device: str
    backend: str | None  # None if no backend can run
    reason: str


def implement(
    op: str,
    *,
    limits: dict[str, Callable[..., str | None]] | None = None,
    **implementations: Callable,
) -> None:
    """Give the schema of `op` its implementations, by backend name.

    Each implementation takes the schema's arguments. The sm_90a kernels are not named here: they
    are those of the compiled library. A kernel with other arguments is called by `sm90`, which gets
    the kernels' namespace before the schema's arguments.

    limits: by backend, a function of the arguments that returns why it does not take them, or None.
    """
    _implementations[op] = implementations
    _limits[op] = limits or {}

    def dispatch(*args):
        run = resolve(op, *args)
        if not autocasts(args[0].device):
            return run(*args)
        # The op is done in the precision of its own contract, not that of the PyTorch ops in it
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*args)

    for key in ("CPU", "CUDA"):
        library.impl(op, dispatch, key)


def deferred(package: str, function: str = "forward") -> Callable | None:
    """Return `function` of the op's `triton_kernels.py`, which is imported when it first runs;
    None if Triton is not installed.

    Triton is an optional dependency, and slow to import for those who stay on a CPU.
    """
    if find_spec("triton") is None:
        return None

    def run(*arguments):
        return getattr(import_module(f"{package}.triton_kernels"), function)(*arguments)

    return run


def register_fake(op: str) -> Callable:
    """Decorate a function of the arguments of `aapt::<op>` that returns empty results."""
    return torch.library.register_fake(f"{NAMESPACE}::{op}", lib=library)


def register_autograd(op: str, backward: Callable, setup_context: Callable) -> None:
    """Give `aapt::<op>` its first derivative, by the op `aapt::<op>_backward`.

    The second derivative is that of the reference, if the reference runs: plain PyTorch
    differentiates it. Any other backend raises NotImplementedError by name.
    """
    torch.library.register_autograd(
        f"{NAMESPACE}::{op}", backward, setup_context=setup_context, lib=library
    )
    first = f"{op}_backward"

    def save(ctx, inputs, output):
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    def differentiate_again(ctx, *gradients):
        tensors = ctx.saved_tensors
        inputs = [y if x is None else x for x, y in zip(tensors, ctx.others, strict=True)]
        name = choose(first, *inputs)
        if name != "reference":
            raise NotImplementedError(
                f"{op} is differentiable once on backend '{name}', got a second derivative; "
                f'compute it under use_backend("reference")'
            )
        places = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def function(*leaves):
            for place, leaf in zip(places, leaves, strict=True):
                inputs[place] = leaf
            return tuple(_implementations[first]["reference"](*inputs))

        _, pull_back = torch.func.vjp(function, *(inputs[place] for place in places))
        found = dict(zip(places, pull_back(gradients), strict=True))
        return tuple(found.get(place) for place in range(len(inputs)))

    torch.library.register_autograd(
        f"{NAMESPACE}::{first}", differentiate_again, setup_context=save, lib=library
    )


def for_simulator(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors; if `sim` is forced, copies of those that vector loads do not reach.

    A copy costs a simulation nothing. `cuda` hides no cost, and reports its limit.
    """
    if _forced != "sim" or torch.compiler.is_compiling():
        return tensors
    return tuple(x if x is None else aligned(x) for x in tensors)


def resolve(op: str, tensor: Tensor, *rest) -> Callable:
    """Return the implementation that runs `op` on these arguments, or raise BackendError."""
    return implementation(op, choose(op, tensor, *rest))


def choose(op: str, tensor: Tensor, *rest) -> str:
    """Return the backend that runs `op` on these arguments, or raise BackendError; without `rest`,
    on some arguments of which `tensor` is the first."""
    device = tensor.device
    reasons = []
    for name in PREFERENCE.get(device.type, ()) if _forced == "auto" else (_forced,):
        reason = obstacle(op, name, device) or limit_of(op, name)(tensor, *rest)
        if not reason:
            return name
        reasons.append(f"backend '{name}' cannot run {op} on a {device.type} tensor: {reason}")
    raise BackendError("; ".join(reasons) or f"no backend runs {op} on a {device.type} tensor")


def limit_of(op: str, name: str) -> Callable[..., str | None]:
    """Return the function that says why a backend does not take some arguments of an op."""
    return _limits[op].get("cuda" if name == "sim" else name, _no_limit)


def _no_limit(tensor: Tensor, *rest) -> None:
    return None


def implementation(op: str, name: str) -> Callable | None:
    """Return the function in one cell of the table, None if the cell is empty."""
    if name not in SM90:
        return _implementations[op].get(name)
    kernels = getattr(torch.ops, SM90[name])
    kernel, caller = getattr(kernels, op, None), _implementations[op].get("sm90")
    return partial(caller, kernels) if kernel and caller else kernel


def kernels_of(device: torch.device):
    """Return the namespace of the hand-written kernels that may run on tensors of this device, None
    if there are none."""
    if device.type == "cuda" and not no_sm90(device):
        return getattr(torch.ops, SM90["cuda"])
    return getattr(torch.ops, SM90["sim"]) if device.type == "cpu" and _forced == "sim" else None


def may_run_kernels(device: torch.device) -> bool:
    """Return whether calls on tensors of this device may reach a hand-written or Triton kernel."""
    return device.type != "cpu" or _forced in ("sim", "triton")


def obstacle(op: str, name: str, device: torch.device | str) -> str | None:
    """Return why this backend cannot run this op on this device, None if it can."""
    device = torch.device(device)
    # A tensor's device need not be the current one
    own = (device,) if device.type == "cuda" and device.index is not None else ()
    if reason := unavailable(name, *own):
        return reason
    if device.type != takes(name, device.type):
        return f"it takes {takes(name, device.type).upper()} tensors"
    if implementation(op, name) is None:
        return "no kernel for this op yet"
    return None


def takes(name: str, device: str) -> str:
    """Return the kind of device whose tensors this backend takes: `device` if it takes any."""
    if name == "triton":
        return "cpu" if interpreted() else "cuda"
    return {"cuda": "cuda", "cpu": "cpu", "sim": "cpu"}.get(name, device)


def unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Return why this backend can run nothing on a CUDA device, the current one unless given; None
    if it can."""
    if name == "cuda":
        return no_sm90(device)
    if name == "triton":
        return no_triton(device)
    if name == "sim":
        return no_sim()
    return None


def no_triton(device: torch.device | None = None) -> str | None:
    """Return why no Triton kernel can run on this CUDA device, the current one unless given; None
    if one can. Under the interpreter they need none."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = capability_of(device)
    if capability < TRITON_CAPABILITY:
        return f"it takes a device of sm_80 or later, not of {capability}"
    return None


def capability_of(device: torch.device | None) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, the current one for None."""
    return torch.cuda.get_device_capability(*(() if device is None else (device,)))


def interpreted() -> bool:
    """Return whether Triton kernels run under Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_sm90(device: torch.device | None = None) -> str | None:
    """Return why no sm_90a kernel can run on this CUDA device, None if one can; the current device
    unless given."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = capability_of(device)
    if capability != (9, 0):
        return f"the device is not sm_90 but {capability}"
    if reason := native.load():
        return reason
    return _old_driver()


@cache
def _old_driver() -> str | None:
    """Return why the driver cannot run the CUDA runtime that the kernels are linked with, None if
    it can. PyTorch may come with an older runtime, and work."""
    kernels = getattr(torch.ops, SM90["cuda"])
    runtime, driver = (version // 1000 for version in kernels.cuda_versions())
    if driver >= runtime:
        return None
    return (
        f"the kernels are built with CUDA {runtime} and the driver is for CUDA {driver}; install "
        f"driver {DRIVERS.get(runtime, 'of that version')} or later"
    )


def no_sim() -> str | None:
    """Return why the sm_90a kernels cannot be simulated here, None if they can."""
    return native.no_simulator()


class use_backend:
    """Choose the backend of every op: `use_backend("reference")`, or as a context manager.

    Names: auto, cuda, triton, cpu, reference; to run kernels without a device sim, and triton with
    TRITON_INTERPRET=1 in the environment. A plain call holds until the next. A context holds its
    own name, however often one object is entered, and leaves what was chosen before it.

    The choice is global and holds for the backward pass too. ValueError for another name;
    BackendError, here or at the op, if the backend cannot run.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
        if reason := unavailable(name):
            raise BackendError(f"backend '{name}' cannot run: {reason}")
        self._name = name
        self._before = [_forced]
        self._entered = False
        _force(name)

    def __enter__(self) -> "use_backend":
        if self._entered or _forced != self._name:
            self._before.append(_forced)
        self._entered = True
        _force(self._name)
        return self

    def __exit__(self, *error) -> None:
        _force(self._before.pop())


def _force(name: str) -> None:
    global _forced
    _forced = name


def backends(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, head_dim: int = 64
) -> list[Choice]:
    """Return what `auto` runs for each op, and why nothing better.

    device: the CPU and, if any, the CUDA device unless given. dtype, head_dim: of the tensors;
    without a dtype the limits of calls are left out. Limits of a single call beyond these, such as
    its strides, are not in this table.
    """
    devices: Sequence = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        _choice(op, torch.device(place), dtype, head_dim)
        for op in sorted(_implementations)
        for place in (devices if device is None else (device,))
    ]


def _choice(op: str, device: torch.device, dtype: torch.dtype | None, head_dim: int) -> Choice:
    reasons = []
    for name in PREFERENCE.get(device.type, ()):
        reason = obstacle(op, name, device)
        if device.type == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        if not reason and dtype is not None:
            reason = limit_of(op, name)(_example(op, dtype, head_dim))
        if not reason:
            return Choice(op, str(device), name, "; ".join(reasons))
        reasons.append(f"{name}: {reason}")
    return Choice(op, str(device), None, "; ".join(reasons))


def _example(op: str, dtype: torch.dtype, head_dim: int) -> Tensor:
    """Return a first argument of an op, without memory."""
    if op.startswith("causal_conv3d"):
        video = torch.empty(1, head_dim, 2, 2, 2, dtype=dtype, device="meta")
        return video.to(memory_format=torch.channels_last_3d)
    return torch.empty(1, 2, 1, head_dim, dtype=dtype, device="meta")
