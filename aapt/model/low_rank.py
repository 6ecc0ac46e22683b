"""Low-rank adaptations (LoRA) of linear layers: W + alpha / rank * up @ down, with W frozen."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRA:
    """Numbers of an adaptation.

    Attributes:
        rank: Rank of the change of a weight.
        alpha: The change is multiplied by alpha / rank; None for the rank.
        targets: Names of the adapted linear layers in the transformer's blocks. In Wan's block,
            `q`, `text_kv` and `out` also name layers of the cross-attention.
        whole: Parts of the transformer, by name, that learn wholly beside the adaptations. The
            layer of inputs is one, because new condition channels have no weights to adapt.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ("qkv", "out", "mlp_up", "mlp_down")
    whole: tuple[str, ...] = ("video_in",)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number above 0, got {self.alpha}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LowRankLinear(nn.Linear):
    """A linear layer with a frozen weight and bias, and an adaptation that learns.

    `up` starts at zero, so that the layer starts as it was. It takes over the parameters of
    `layer`, which are not copied.
    """

    def __init__(self, layer: nn.Linear, lora: LoRA):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, lora.scale
        self.requires_grad_(False)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.down = nn.Parameter(torch.empty(lora.rank, self.in_features, **like))
        self.up = nn.Parameter(torch.zeros(self.out_features, lora.rank, **like))
        nn.init.normal_(self.down, std=self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's result, as `nn.Linear` does."""
        return F.linear(x, self.weight, self.bias) + self.change(x)

    def product(self, x: Tensor) -> Tensor:
        """Returns the layer's result without its bias."""
        return F.linear(x, self.weight) + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """Returns what the adaptation adds to the result (..., out) for x (..., in)."""
        return self.scale * F.linear(F.linear(x, self.down), self.up)

    def merged(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Returns the weight (out, in) with the change of factors (rank, in) and (out, rank)."""
        return torch.addmm(weight, up, down, alpha=self.scale)


def adapt(world: nn.Module, lora: LoRA) -> None:
    """Freezes a `WorldModel` and adapts the linear layers of its blocks that `lora` names.

    ValueError for a name that its transformer does not have.
    """
    world.requires_grad_(False)
    layers = [
        (parent, name)
        for parent in world.transformer.blocks.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    known = {name for _, name in layers}
    for target in lora.targets:
        if target not in known:
            raise ValueError(f"targets: expected some of {', '.join(sorted(known))}, got {target}")
    for parent, name in layers:
        if name in lora.targets:
            setattr(parent, name, LowRankLinear(getattr(parent, name), lora))
    parts = dict(world.transformer.named_children())
    for name in lora.whole:
        if name not in parts:
            raise ValueError(f"whole: expected some of {', '.join(parts)}, got {name}")
        parts[name].requires_grad_(True)


def merged(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a module's state, by name, with every adaptation added to its weight.

    The names are then those of the module without adaptations.
    """
    tensors = dict(tensors)
    for prefix, layer in module.named_modules():
        if not isinstance(layer, LowRankLinear):
            continue
        down, up = (tensors.pop(f"{prefix}.{name}") for name in ("down", "up"))
        tensors[f"{prefix}.weight"] = layer.merged(tensors[f"{prefix}.weight"], down, up)
    return tensors
