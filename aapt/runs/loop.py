"""The loop around every stage: updates, what is shown of them, and what survives a crash."""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..checkpoint import write_json
from ..data.randomness import ClipRandom
from ..training.stages import Metrics, Stage
from .failed_update import RecordedSets, save_inputs
from .monitor import Monitor
from .parallel import Parallel
from .state import load_training_state, save_training_state

RECIPE = "recipe.json"  # in a run's folder
STATES = "states"  # in a stage's folder, until it is done


class TrainingError(RuntimeError):
    """Training that cannot go on, and why."""


@dataclass(frozen=True)
class Habits:
    """What changes how a stage is run, and not what comes out of it.

    Attributes:
        save_every, sample_every: Updates from one state, or sheet of samples, to the next; None
            for never.
        clips_at_once: So many of a rank's clips go through the networks together, None for all;
            gradients of the rest accumulate. (Sums are then taken in another order.)
        checkpoint_blocks: Compute activations again in the backward pass.
    """

    save_every: int | None = 100
    sample_every: int | None = 250
    clips_at_once: int | None = None
    checkpoint_blocks: bool = False


def train(
    stage: Stage,
    sets: Mapping,
    folder: Path,
    *,
    seed: int,
    parallel: Parallel,
    habits: Habits,
    sample: Callable[[int], None] | None = None,
) -> nn.Module:
    """All updates of a stage, from the newest state in its folder on; returns what it exports.

    Each update is a line of `metrics.jsonl`. `sample` is called with the number of updates so far.
    Every rank calls this. TrainingError where a metric or a gradient is not finite: the update's
    inputs are then in the folder.
    """
    name = folder.name
    seed = seed << 32 | zlib.crc32(name.encode())  # no stage draws what another one has
    start = load_training_state(folder / STATES, stage.trained, parallel)
    monitor = Monitor(folder, name, stage.steps, start) if parallel.main else None
    with monitor or nullcontext():
        for step in range(start, stage.steps):
            recorded = RecordedSets(sets)
            metrics: Metrics = {}
            try:
                for random, share in parts(stage, seed, step, parallel, habits.clips_at_once):
                    for key, value in stage.accumulate(recorded, random, step, share).items():
                        metrics[key] = metrics.get(key, 0.0) + share * value
                metrics = parallel.mean(metrics) | stage.update(step)
                failure = None if all(map(math.isfinite, metrics.values())) else "not finite"
            except RuntimeError as error:
                failure = error
            if failure:
                path = folder / f"inputs-{step}-rank-{parallel.rank}.safetensors"
                save_inputs(path, recorded.drawn, seed=seed, step=step, metrics=metrics)
                cause = failure if isinstance(failure, Exception) else None
                raise TrainingError(
                    f"{name}: step {step}: {failure}; its inputs are in {path}"
                ) from cause
            if monitor:
                monitor.update(step, metrics)
            done = step + 1
            if habits.save_every and done % habits.save_every == 0 and done < stage.steps:
                save_training_state(folder / STATES, done, stage.trained, parallel)
            if sample and habits.sample_every and done % habits.sample_every == 0:
                sample(done)
    return stage.export()


def parts(
    stage: Stage, seed: int, step: int, parallel: Parallel, clips_at_once: int | None
) -> list[tuple[ClipRandom, float]]:
    """This rank's clips of an update, some at once, each with its share of the gradient."""
    clips = parallel.clips(stage.batch(step))
    size = clips_at_once or len(clips)
    return [
        (
            ClipRandom(seed, step, clips[i : i + size], parallel.device),
            len(clips[i : i + size]) / len(clips),
        )
        for i in range(0, len(clips), size)
    ]


def drop_states(folder: Path) -> None:
    """Once a stage's result is on the disk."""
    shutil.rmtree(folder / STATES, ignore_errors=True)


def claim(folder: Path, recipe: dict) -> str | None:
    """Write a recipe into a folder that has none; else say where the one there differs."""
    ours, path = json.loads(json.dumps(recipe)), folder / RECIPE
    theirs = stored_recipe(folder)
    if theirs is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)
        return None
    said = _difference(ours, theirs)
    return said and f"{path}: {said}"


def stored_recipe(folder: Path) -> dict | None:
    """What `claim` has written into a folder."""
    path = folder / RECIPE
    return json.loads(path.read_text()) if path.is_file() else None


def _difference(ours, theirs, part: str = "") -> str | None:
    """The first part in which a recipe differs from what the stored one says of it."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return None if ours == theirs else f"{part}: expected {ours}, got {theirs}"
    for key, value in theirs.items():
        name = f"{part}.{key}" if part else key
        said = _difference(ours[key], value, name) if key in ours else f"{name}: not expected"
        if said:
            return said
    return None
