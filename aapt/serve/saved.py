"""A world's snapshot as a file that its client keeps, for the day another server takes over."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..streaming.actions import Walk, frames_crc
from ..streaming.history import Kept
from ..streaming.snapshot import Snapshot
from ..streaming.snapshot_file import load_snapshot, read_file, write_snapshot


@dataclass(frozen=True)
class SavedWorld:
    """A saved world as it was uploaded: the place of its step and that step's video frames, uint8
    (F, H, W, 3), not yet compared with a walk."""

    digest: str
    branch: int
    step: int
    frames: np.ndarray
    tensors: dict[str, Tensor]
    facts: dict[str, str]


def write_saved(kept: Kept, digest: str) -> bytes:
    """Returns the file of a snapshot. digest: of the model."""
    facts = {"model": digest, "branch": str(kept.branch), "step": str(kept.step)}
    return write_snapshot(kept.snapshot, {"frames": torch.from_numpy(kept.frames.copy())}, facts)


def read_saved(data: bytes) -> SavedWorld:
    """Reads a file of `write_saved`. ValueError for any other."""
    tensors, facts = read_file(data)
    try:
        place = facts["model"], int(facts["branch"]), int(facts["step"])
        frames = tensors.pop("frames").numpy()
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            "saved: expected model, branch, step and frames of a saved world"
        ) from None
    return SavedWorld(*place, frames, tensors, facts)


def load_saved(saved: SavedWorld, walk: Walk, like: Snapshot) -> Snapshot:
    """Returns the snapshot of a saved world. ValueError unless it is of a step of this walk, with
    the frames that the walk noted for that step, and of the form of `like`."""
    if saved.digest != walk.digest:
        raise ValueError(
            f"saved: expected a world of {walk.digest[:12]}, got one of {saved.digest[:12]}"
        )
    walk.check(saved.branch, saved.step)
    snapshot = load_snapshot(like, saved.tensors, saved.facts)
    path = walk.path(saved.branch, saved.step)
    if (snapshot.seed, snapshot.steps) != (walk.seed, len(path)):
        raise ValueError(
            f"saved: expected seed {walk.seed} and step {len(path)}, "
            f"got {snapshot.seed} and {snapshot.steps}"
        )
    if path and path[-1].crc != frames_crc(saved.frames):
        raise ValueError("saved: expected the frames that the walk noted, got others")
    return snapshot
