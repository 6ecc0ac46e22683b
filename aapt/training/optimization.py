"""Optimization that stages share: schedules, optimizers, updates and moving averages."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..device import multiplies_bfloat16
from ..model.world_model import WorldModel
from .eight_bit import AdamW8, RMSprop8


@dataclass(frozen=True)
class Schedule:
    """A learning rate: a linear warm-up of `warmup` updates, times constant or cosine decay.

    Cosine decay ends at a hundredth of `learning_rate`.
    """

    learning_rate: float
    warmup: int = 0
    decay: Literal["constant", "cosine"] = "constant"

    def __post_init__(self):
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay: expected 'constant' or 'cosine', got {self.decay!r}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate: expected a finite number of at least 0, got {self.learning_rate}"
            )
        if self.warmup < 0:
            raise ValueError(f"warmup: expected at least 0, got {self.warmup}")

    def __call__(self, step: int, steps: int) -> float:
        """The rate of update `step` of `steps`."""
        ramp = min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay == "constant":
            return self.learning_rate * ramp
        falling = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
        return self.learning_rate * ramp * max(falling, 0.01)


class MuonAdamW:
    """Muon for the matrices inside the transformer's blocks, AdamW for all other parameters.

    Both have one learning rate, because Muon's steps are scaled to AdamW's. In our runs a small
    model learnt as much in two updates as under AdamW in three (`benchmarks/LOG.md`). Muon
    orthogonalises whole matrices, also if they are sharded. It does so in bfloat16, if the device
    multiplies that, so updates on several ranks differ from those on one rank by a few percent.
    AdamW's moments have `state_bits`.
    """

    def __init__(
        self,
        model: WorldModel,
        betas: tuple[float, float],
        weight_decay: float,
        state_bits: int = 32,
    ):
        matrices = [
            layer.weight
            for layer in model.transformer.blocks.modules()
            if isinstance(layer, nn.Linear)
        ]
        known = set(map(id, matrices))
        others = [p for p in model.parameters() if id(p) not in known]
        self.optimizers = (
            torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            adamw(others, betas, weight_decay, state_bits),
        )
        self.narrow = all(multiplies_bfloat16(matrix.device) for matrix in matrices)

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        with nullcontext() if self.narrow else WithoutBfloat16():
            for optimizer in self.optimizers:
                optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


class WithoutBfloat16(TorchFunctionMode):
    """Copies in the same dtype for code that asks for bfloat16, as `torch.optim.Muon` does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.bfloat16:
            return args[0].clone()
        return function(*args, **(kwargs or {}))


def update(
    optimizer: torch.optim.Optimizer | MuonAdamW,
    learning_rate: float,
    parameters: Iterable[Tensor],
    max_norm: float | None,
) -> float:
    """Clip the gradients, take a step and clear the gradients. Returns the norm before clipping.

    A group of parameters with a `scale` has that share of the learning rate. The norm is of the
    whole gradients, also if they are sharded. RuntimeError on every rank, before a parameter has
    moved, if the norm is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)
    limit = math.inf if max_norm is None else max_norm
    norm = nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def make_optimizer(
    model: WorldModel,
    betas: tuple[float, float],
    weight_decay: float,
    muon: bool,
    state_bits: int = 32,
) -> torch.optim.Optimizer | MuonAdamW:
    """Make AdamW as in the paper, or `MuonAdamW` (ours, for small models).

    It moves the parameters that require a gradient. state_bits: as in `adamw`. ValueError for Muon
    and a model of which only a part learns, because Muon is for whole matrices.
    """
    if not muon:
        return adamw(learning(model), betas, weight_decay, state_bits)
    if len(learning(model)) < len(list(model.parameters())):
        raise ValueError("muon: expected False for a model with LoRA, got True")
    return MuonAdamW(model, betas, weight_decay, state_bits)


def learning(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def adamw(
    parameters: Iterable[Tensor],
    betas: tuple[float, float],
    weight_decay: float,
    state_bits: int = 32,
) -> torch.optim.Optimizer:
    """Make AdamW with moments of `state_bits`, 32 or 8 (`eight_bit`). ValueError for others."""
    kinds = {32: torch.optim.AdamW, 8: AdamW8}
    return _kind(kinds, state_bits)(parameters, betas=betas, weight_decay=weight_decay)


def rmsprop(
    parameters: Iterable[Tensor], alpha: float, state_bits: int = 32
) -> torch.optim.Optimizer:
    """Make RMSProp with moments of `state_bits`, 32 or 8 (`eight_bit`). ValueError for others."""
    return _kind({32: torch.optim.RMSprop, 8: RMSprop8}, state_bits)(parameters, alpha=alpha)


def _kind(kinds: Mapping[int, type], state_bits: int) -> type:
    if state_bits not in kinds:
        raise ValueError(f"state_bits: expected 8 or 32, got {state_bits}")
    return kinds[state_bits]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Let gradients flow through modules, but not into their parameters."""
    parameters = [p for module in modules for p in learning(module)]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class MovingAverage:
    """An exponential moving average of the parameters of a module that learn, for export.

    With `from_scratch` the first updates count more, so that random first weights fade sooner.
    """

    def __init__(self, module: nn.Module, decay: float, from_scratch: bool = False):
        self.decay, self.from_scratch = decay, from_scratch
        self.updates = 0
        self.shadow = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the parameters of the moment to the average."""
        self.updates += 1
        ramp = self.updates / (self.updates + 10) if self.from_scratch else 1.0
        parameters = dict(module.named_parameters())
        moved = [parameters[name] for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), moved, 1 - min(self.decay, ramp))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Replace the parameters of a module by their averages."""
        parameters = dict(module.named_parameters())
        for name, average in self.shadow.items():
            parameters[name].copy_(average)


class Trained:
    """A network that learns, with its optimizer and, if it has one, its average."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | MuonAdamW,
        average: MovingAverage | None = None,
    ):
        self.module, self.optimizer, self.average = module, optimizer, average
        self.parameters = learning(module)

    def update(self, learning_rate: float, max_norm: float | None) -> float:
        """Take a step along the accumulated gradients. Returns their norm, see `update`."""
        norm = update(self.optimizer, learning_rate, self.parameters, max_norm)
        if self.average:
            self.average.update(self.module)
        return norm

    def export(self) -> nn.Module:
        """The module, with averaged weights if it has an average."""
        if self.average:
            self.average.copy_to(self.module)
        return self.module
