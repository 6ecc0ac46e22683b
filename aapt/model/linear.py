"""Products of linear layers, whatever their form: plain, adapted (`low_rank`), in 8 bits
(`float8`)."""

import torch.nn.functional as F
from torch import Tensor, nn


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """Multiplies x (..., in) by the weight of a linear layer, without its bias: (..., out)."""
    return F.linear(x, layer.weight) if type(layer) is nn.Linear else layer.product(x)
