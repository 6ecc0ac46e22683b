"""Low-rank adaptations (LoRA) of linear layers, added to the weights they belong to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from .names import wan_name
from .tensor_files import StoredTensor, find_tensors

ENTRIES = ("generator_lora", "lora", "state_dict")
# The last segments of a name: PEFT's, also with the name of an adapter, and those of other trainers
PART = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|alpha)(\.default)?(\.weight)?$")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}


@dataclass(frozen=True)
class LowRank:
    """An adaptation of one layer's weight W: W + alpha / rank * up @ down."""

    down: StoredTensor  # (rank, inputs)
    up: StoredTensor  # (outputs, rank)
    alpha: StoredTensor | float

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, summed in float32 or wider, in the dtype of the given one."""
        alpha = self.alpha if isinstance(self.alpha, float) else float(self.alpha.read())
        wide = torch.promote_types(weight.dtype, torch.float32)
        up, down = self.up.read().to(wide), self.down.read().to(wide)
        scale = alpha / len(down)
        return torch.addmm(weight.to(wide), up, down, alpha=scale).to(weight.dtype)


def find_lora(
    path: Path, weights: Mapping[str, StoredTensor], alpha: float | None
) -> dict[str, LowRank]:
    """Find the adaptations in a file, by Wan's names of the weights that they change.

    alpha: of a file that has none; the rank of each layer unless given. CheckpointError for a
    tensor that is no part of an adaptation, belongs to no weight, or does not fit its weight.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in find_tensors(path, ENTRIES).items():
        found = PART.search(name)
        if not found:
            raise CheckpointError(
                f"{path}: expected names that end in lora_A, lora_B or alpha, got {name}"
            )
        layer = wan_name(PART.sub(".weight", name))
        parts.setdefault(layer, {})[ROLES[found[1]]] = tensor
    return {layer: _low_rank(path, layer, part, weights, alpha) for layer, part in parts.items()}


def _low_rank(
    path: Path,
    layer: str,
    part: Mapping[str, StoredTensor],
    weights: Mapping[str, StoredTensor],
    alpha: float | None,
) -> LowRank:
    if layer not in weights:
        raise CheckpointError(f"{path}: the adaptation of {layer} belongs to no weight")
    for role in ("down", "up"):
        if role not in part:
            raise CheckpointError(f"{path}: expected both factors of {layer}, {role} is missing")
    down, up, weight = part["down"], part["up"], weights[layer]
    if weight.shape != (up.shape[0], down.shape[-1]) or up.shape[-1:] != down.shape[:1]:
        raise CheckpointError(
            f"{path}: {layer}: expected factors of {weight.shape}, got {up.shape} and {down.shape}"
        )
    given = float(down.shape[0]) if alpha is None else float(alpha)
    return LowRank(down, up, part.get("alpha", given))
