"""Devices and the precision of networks."""

from contextlib import AbstractContextManager

import torch
from torch import nn


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of a name. ValueError, with the reason, if PyTorch cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {device}: {reason}") from None


def move(network: nn.Module, device: str | torch.device) -> None:
    """Move a network to a device, in place. ValueError if there is no such device."""
    try:
        network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {device}: {error}") from None


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Return a context of bfloat16 matrix products with float32 parameters.

    Code without gradients and code with gradients need a context each, because autocast keeps its
    casts of parameters for the whole context: a cast kept from the first would pass its gradient on
    too late, after FSDP has reduced the gradients.
    """
    return torch.autocast(device.type, torch.bfloat16)
