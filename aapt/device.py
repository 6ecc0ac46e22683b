"""Where networks run."""

import torch
from torch import nn


def move(network: nn.Module, device: str | torch.device) -> None:
    """Onto a device, in place. ValueError for one that is not there."""
    try:
        network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {device}: {error}") from None
