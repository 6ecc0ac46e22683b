"""The inputs of an update that went wrong, kept so that it can be looked at and run again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import save_tensors
from .monitor import plain_number


class RecordedSets:
    """Sets of clips that remember in `drawn` what is drawn from them: one for each update.

    >>> recorded = RecordedSets(sets)
    >>> metrics = stage.accumulate(recorded, random, step)
    """

    def __init__(self, sets: Mapping[str, Any]):
        self.sets = sets
        self.drawn: list[Any] = []

    def __getitem__(self, name: str) -> "RecordedClips":
        return RecordedClips(self.sets[name], self.drawn)


class RecordedClips:
    """One of the sets: its batches go into `drawn` too."""

    def __init__(self, clips: Any, drawn: list[Any]):
        self.clips, self.drawn = clips, drawn

    def part(self, *args, **kwargs) -> "RecordedClips":
        return RecordedClips(self.clips.part(*args, **kwargs), self.drawn)

    def sample(self, *args, **kwargs):
        batch = self.clips.sample(*args, **kwargs)
        self.drawn.append(batch)
        return batch


def save_inputs(
    path: Path,
    batches: Sequence[Any],
    *,
    seed: int,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Write what an update was given as one safetensors file, whole or not at all.

    batches: What it drew: dataclasses such as `ClipBatch`, or tensors. Tensor `n.latents` is field
    `latents` of batch n, `n.batch` a batch that is a tensor. The metadata hold seed, step, metrics
    and, as `n.prompts`, every field that is no tensor; each value is JSON.
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
