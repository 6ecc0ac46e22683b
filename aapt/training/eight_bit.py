"""AdamW and RMSProp whose moments take one byte per number.

    moment = scale * 2^((code - 255) / 8)        codes 1 to 255; 0 is zero

A block of up to 256 neighbours in a row has one scale, the largest magnitude in the block. Codes
are a logarithmic grid with 8 levels per octave: 31 octaves, or 15 for a moment with a sign. A block
never crosses rows. FSDP gives each rank whole rows, so the codes do not depend on the ranks.

A moment that decays by 0.1 % per update would never leave its level if it were rounded to the
nearest one. A dither, which spreads evenly over updates, decides between the two levels around a
value, and so keeps the mean (`benchmarks/LOG.md`). No random numbers are drawn, so a resumed run
repeats every bit.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 256
PER_OCTAVE = 8  # codes
# Fractional parts of multiples of these fill the unit interval evenly.
PER_UPDATE, PER_COLUMN = 0.6180339887498949, 0.7548776662466927


def encode(x: Tensor, update: int, codes: Tensor, scales: Tensor) -> None:
    """Fill codes and scales from x (rows, n), whose value they keep on average over updates.

    A value above zero never becomes zero in uint8 codes, because a step is divided by it.

    Args:
        update: Number of the update, which decides the dither.
        codes: (rows, n), int8 with a sign, or uint8 for x >= 0.
        scales: (rows, ceil(n / 256)), float32.
    """
    levels = _levels(codes)
    blocks = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales.copy_(blocks.abs().amax(-1))
    share = blocks.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    below = torch.bucketize(share, levels, right=True, out_int32=True) - 1
    below.clamp_(max=len(levels) - 2)
    low, high = levels[below], levels[below + 1]
    columns = torch.arange(BLOCK, device=x.device, dtype=torch.float32)
    dither = (update * PER_UPDATE % 1 + columns * PER_COLUMN) % 1
    code = below + ((share - low) / (high - low) > dither)
    code = code.clamp(min=0 if codes.dtype.is_signed else 1) * blocks.sign()
    codes.copy_(code.flatten(1)[:, : x.shape[1]])


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values (rows, n) of codes, see `encode`."""
    code = codes.int()
    share = _levels(codes)[code.abs()] * code.sign()
    return share * scales.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]


def _levels(codes: Tensor) -> Tensor:
    """The values of the codes from 0 up, as shares of the scale.

    A table, because powers and logarithms on a CPU depend on a number's place in memory.
    """
    top = torch.iinfo(codes.dtype).max
    powers = [2.0 ** ((code - top) / PER_OCTAVE) for code in range(1, top + 1)]
    return torch.tensor([0.0, *powers], device=codes.device)


class EightBitOptimizer(torch.optim.Optimizer):
    """An optimizer with moments in 8 bits. Parameters of one dimension keep float32 moments.

    Attributes:
        MOMENTS: Moments by name, with the types of their codes.
    """

    MOMENTS: dict[str, torch.dtype]

    def move(self, group: dict, p: Tensor, gradient: Tensor, step: int, *moments: Tensor) -> None:
        """Take step number `step`, counted from 1: change a parameter and its moments in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step along the gradients.

        ValueError for a closure, which has no use here, and for a parameter that is not contiguous.
        """
        if closure is not None:
            raise ValueError(f"closure: expected none, got {closure}")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = self._new(p)
                own = {name: _local(x) for name, x in self.state[p].items()}
                self._step(group, _local(p), _local(p.grad), own)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the states that `state_dict` returns.

        Codes and scales keep their types, which torch would turn into the parameter's. ValueError
        for moments that are not in 8 bits.
        """
        ours, theirs = (
            [p for group in groups for p in group["params"]]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        saved = {p: state_dict["state"].get(key, {}) for p, key in zip(ours, theirs)}
        for p, states in saved.items():
            for name, dtype in self.MOMENTS.items() if p.dim() > 1 else ():
                if states and states[name].dtype != dtype:
                    raise ValueError(
                        f"state_dict: expected {name} of {dtype}, got {states[name].dtype}; load "
                        "the states of an optimizer in 8 bits"
                    )
        super().load_state_dict(state_dict)
        for p, states in saved.items():
            for name in self.state[p] if states else ():
                place = self.state[p][name].device
                self.state[p][name] = states[name].detach().clone().to(place)

    def _new(self, p: Tensor) -> dict[str, Tensor]:
        """The states of a parameter before its first step, sharded as the parameter is."""
        if not p.is_contiguous():  # rows would be copies, and a step would be lost
            raise ValueError(f"params: expected contiguous ones, got strides {p.stride()}")
        states = {"step": torch.tensor(0.0)}
        for name, dtype in self.MOMENTS.items():
            states[name] = torch.zeros_like(p, dtype=dtype if p.dim() > 1 else None)
            if p.dim() > 1:
                scales = p.flatten(1)[:, ::BLOCK]
                states[f"{name}_scales"] = torch.zeros_like(scales, dtype=torch.float32)
        return states

    def _step(self, group: dict, p: Tensor, gradient: Tensor, states: dict[str, Tensor]) -> None:
        states["step"] += 1
        step = int(states["step"])
        if p.dim() < 2:
            self.move(group, p, gradient, step, *(states[name] for name in self.MOMENTS))
            return
        coded = [(states[name].flatten(1), states[f"{name}_scales"]) for name in self.MOMENTS]
        moments = [decode(*pair).to(p.dtype) for pair in coded]
        self.move(group, p.flatten(1), gradient.flatten(1), step, *moments)
        for moment, pair in zip(moments, coded, strict=True):
            encode(moment, step, *pair)


class AdamW8(EightBitOptimizer):
    """`torch.optim.AdamW` with both moments in 8 bits."""

    MOMENTS = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, given)

    def move(self, group: dict, p: Tensor, gradient: Tensor, step: int, *moments: Tensor) -> None:
        mean, square = moments
        first, second = group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        deviation = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, deviation, value=-group["lr"] / (1 - first**step))


class RMSprop8(EightBitOptimizer):
    """`torch.optim.RMSprop` with its moment in 8 bits."""

    MOMENTS = {"square_avg": torch.uint8}

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8
    ):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    def move(self, group: dict, p: Tensor, gradient: Tensor, step: int, *moments: Tensor) -> None:
        (square,) = moments
        square.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
        p.addcdiv_(gradient, square.sqrt().add_(group["eps"]), value=-group["lr"])


def _local(x: Tensor) -> Tensor:
    """This rank's shard of a tensor, which shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x
