"""Inputs of an update that failed, kept so that it can be inspected and repeated."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import save_tensors
from .monitor import plain_number


class RecordedSets:
    """Sets of clips that record in `drawn` all that is read from them. One serves one update.

    >>> recorded = RecordedSets(sets)
    >>> metrics = stage.accumulate(recorded, random, step)
    """

    def __init__(self, sets: Mapping[str, Any]):
        self.sets = sets
        self.drawn: list[Any] = []

    def __getitem__(self, name: str) -> "RecordedClips":
        return RecordedClips(self.sets[name], self.drawn)


class RecordedClips:
    """One set of `RecordedSets`."""

    def __init__(self, clips: Any, drawn: list[Any]):
        self.clips, self.drawn = clips, drawn

    def part(self, *args, **kwargs) -> "RecordedClips":
        return RecordedClips(self.clips.part(*args, **kwargs), self.drawn)

    def sample(self, *args, **kwargs):
        batch = self.clips.sample(*args, **kwargs)
        self.drawn.append(batch)
        return batch

    def motion(self, *args, **kwargs):
        motion = self.clips.motion(*args, **kwargs)
        self.drawn.append(motion)
        return motion

    def __len__(self) -> int:
        return len(self.clips)


def save_inputs(
    path: Path,
    batches: Sequence[Any],
    *,
    seed: int,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Write the inputs of an update as one safetensors file, whole or not at all.

    The tensor `n.latents` is field `latents` of batch n, and `n.batch` is a batch that is a tensor.
    The metadata hold `seed`, `step`, `metrics`, and each field that is not a tensor, such as
    `n.prompts`. Their values are JSON.

    Args:
        batches: What the update drew: dataclasses such as `ClipBatch`, or tensors.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"seed": seed, "step": step}
    facts["metrics"] = {key: plain_number(value) for key, value in metrics.items()}
    for number, batch in enumerate(batches):
        parts = {"batch": batch}
        if is_dataclass(batch):
            parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
        for name, value in parts.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                facts[f"{number}.{name}"] = value
    save_tensors(path, tensors, {key: json.dumps(value) for key, value in facts.items()})
