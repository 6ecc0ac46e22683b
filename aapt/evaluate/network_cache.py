"""Small networks of an evaluation, trained once and kept in the user's cache."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError, fill_module, read_tensors, save_tensors

QUALITY = "quality"  # the tensor of a network's own score in the cached file
Network = TypeVar("Network", bound=nn.Module)


class Training(Protocol):
    """Settings of a small network's training."""

    steps: int
    learning_rate: float
    seed: int


def train_network(
    new: Callable[[], Network], config: Training, loss: Callable[[Network], Tensor]
) -> Network:
    """Train a new network by AdamW, on one cycle of the learning rate.

    new: makes the network; its weights depend on `config.seed` alone. loss: draws a batch and
    returns the network's error on it. Returns the network, which learns no more.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = new()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    for _ in range(config.steps):
        error = loss(network)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def read_or_train(
    path: Path,
    what: str,
    new: Callable[[], Network],
    train: Callable[[], tuple[Network, list[float]]],
    scores: int,
) -> tuple[Network, list[float]]:
    """Read a network and its scores from the file `path`, or train it and keep it there.

    Several processes may share the folder. If the network cannot be read or kept, it is trained for
    this evaluation alone, with a warning that names it as `what`.

    new: makes the network to fill. scores: how many numbers `train` returns beside the network.
    """
    try:
        if path.is_file():
            return _read(path, what, new(), scores)
    except (OSError, CheckpointError) as error:
        warnings.warn(f"{what}: expected one in the cache, got {error}", stacklevel=3)
    network, found = train()
    measured = torch.tensor(found, dtype=torch.float64)
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # no other process writes there
            save_tensors(Path(own) / path.name, {**network.state_dict(), QUALITY: measured})
            os.replace(Path(own) / path.name, path)
    except OSError as error:
        said = error.strerror or error
        warnings.warn(f"{what}: cannot be kept in {folder}: {said}", stacklevel=3)
    return network, found


def _read(path: Path, what: str, network: Network, scores: int) -> tuple[Network, list[float]]:
    tensors = read_tensors(path)
    quality: Tensor = tensors.pop(QUALITY, torch.zeros(0))
    if quality.shape != (scores,):
        raise CheckpointError(
            f"{path}: expected the {what}'s quality ({scores},), got {tuple(quality.shape)}"
        )
    fill_module(path, tensors, network)
    return network.eval().requires_grad_(False), quality.tolist()
