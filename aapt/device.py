"""Where networks run."""

from contextlib import AbstractContextManager

import torch
from torch import nn


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. ValueError, with the reason, if PyTorch cannot use it here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {device}: {reason}") from None


def move(network: nn.Module, device: str | torch.device) -> None:
    """Onto a device, in place. ValueError for one that is not there."""
    try:
        network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {device}: {error}") from None


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """bfloat16 matrix products with float32 parameters.

    One context for what runs without gradient and another one for what runs with it: a cast that is
    kept from the first would hand its gradient on after FSDP has reduced it.
    """
    return torch.autocast(device.type, torch.bfloat16)
