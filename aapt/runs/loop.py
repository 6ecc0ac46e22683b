"""The loop of updates around every stage, with records and states that survive a crash."""

import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import write_json
from ..data.randomness import ClipRandom
from ..lock import FolderInUse, folder_lock
from ..training.stages import Metrics, Stage
from .failed_update import RecordedSets, save_inputs
from .monitor import Monitor
from .parallel import Parallel
from .sheets import Sheets
from .state import load_training_state, save_training_state

RECIPE = "recipe.json"  # in a run's folder
STATES = "states"  # in a stage's folder, until the stage is done
# Fields of stages by their names in recipe.json of older versions.
RENAMED = {"judge": "discriminator_start", "judge_recycled": "discriminator_recycled"}


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its result, up to the order of sums.

    Attributes:
        save_every: Updates from one saved state to the next; None for no states.
        sample_every: Updates from one sheet of samples to the next, more if sheets would take more
            than 5 % of the time; None for no sheets.
        clips_at_once: Clips of this rank per forward pass; None for all of them. Gradients of
            several passes accumulate.
        checkpoint_blocks: Compute activations again in the backward pass, to save memory.
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
    options: RunOptions,
    sample: Callable[[int], Mapping[str, float] | None] | None = None,
) -> None:
    """Make all updates of a stage, resuming from the newest state in its folder.

    Every rank calls it. Each update adds a line to `metrics.jsonl`. After an exception or a kill at
    any point, the same call with the stage built anew continues bit for bit.

    Args:
        stage: Its networks hold the weights that the stage starts from.
        sets: Clips by the name of their set.
        sample: Called with the number of finished updates, to draw a sheet of samples; may return
            `measures` of them. Sheets take at most 5 % of the time (`Sheets`).

    TrainingError if an update fails or one of its metrics or gradients is not finite. The folder
    then holds the inputs of the update.
    """
    name = folder.name
    seed = seed << 32 | zlib.crc32(name.encode())  # no two stages draw the same numbers
    start = load_training_state(folder / STATES, stage.trained, parallel)
    for part in stage.trained.values():  # an update that was interrupted leaves gradients
        part.optimizer.zero_grad(set_to_none=True)
    monitor = Monitor(folder, name, stage.steps, start) if parallel.main else None
    sheets = Sheets(options.sample_every) if sample and options.sample_every else None
    with monitor or nullcontext():
        for step in range(start, stage.steps):
            metrics = _update(stage, sets, folder, step, seed, parallel, options.clips_at_once)
            if monitor:
                monitor.update(step, metrics)
            done = step + 1
            if options.save_every and done % options.save_every == 0 and done < stage.steps:
                save_training_state(folder / STATES, done, stage.trained, parallel)
            if sheets and parallel.agree(sheets.due(done)):
                begun = time.perf_counter()
                seen = _sample(sample, name, done)
                sheets.drawn(time.perf_counter() - begun)
                if monitor and seen:
                    monitor.sheet(step, seen)


def _update(
    stage: Stage,
    sets: Mapping,
    folder: Path,
    step: int,
    seed: int,
    parallel: Parallel,
    clips_at_once: int | None,
) -> Metrics:
    """Make one update and return its metrics. TrainingError if it fails; its inputs are kept."""
    recorded = RecordedSets(sets)
    metrics: Metrics = {}
    try:
        for random, share in parts(stage, seed, step, parallel, clips_at_once):
            for key, value in stage.accumulate(recorded, random, step, share).items():
                metrics[key] = metrics.get(key, 0.0) + share * value
        metrics = parallel.mean(metrics) | stage.update(step)
        if all(map(math.isfinite, metrics.values())):
            return metrics
        failure, cause = "not finite", None
    except RuntimeError as error:
        failure = cause = error
    path = folder / f"inputs-{step}-rank-{parallel.rank}.safetensors"
    try:
        save_inputs(path, recorded.drawn, seed=seed, step=step, metrics=metrics)
        kept = f"its inputs are in {path}"
    except OSError as error:
        kept = f"its inputs could not be kept: {error}"
    raise TrainingError(f"{folder.name}: step {step}: {failure}; {kept}") from cause


def _sample(
    sample: Callable[[int], Mapping[str, float] | None], name: str, done: int
) -> Mapping[str, float] | None:
    try:
        return sample(done)
    except RuntimeError as error:  # out of memory would end every resumed run here
        raise TrainingError(
            f"{name}: samples after {done} updates: {error}; resume with --sample-every 0"
        ) from error


def parts(
    stage: Stage, seed: int, step: int, parallel: Parallel, clips_at_once: int | None
) -> list[tuple[ClipRandom, float]]:
    """Split this rank's clips of an update into forward passes.

    Returns for each pass the random numbers of its clips and its share of the gradient.
    """
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
    """Remove the states of a stage whose result is on the disk."""
    shutil.rmtree(folder / STATES, ignore_errors=True)


@contextmanager
def locked(folder: Path, parallel: Parallel) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if it is missing. Every rank calls it.

    Raises on every rank, at once, FolderInUse if another run holds the lock, OSError if the folder
    cannot be written.
    """
    with ExitStack() as held:
        refusal = None
        if parallel.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(folder_lock(folder))
            except (FolderInUse, OSError) as error:
                refusal = error
        refusal = parallel.agree(refusal)
        if refusal:
            raise refusal
        yield


def claim(folder: Path, recipe: dict) -> str | None:
    """Write a recipe into a folder that has none, or return how the stored one differs."""
    ours, path = json.loads(json.dumps(recipe)), folder / RECIPE
    theirs = stored_recipe(folder)
    if theirs is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)
        return None
    difference = _difference(ours, theirs)
    return difference and f"{path}: {difference}"


def stored_recipe(folder: Path) -> dict | None:
    """Read the recipe that `claim` wrote into a folder; None if there is none."""
    path = folder / RECIPE
    return _renamed(json.loads(path.read_text())) if path.is_file() else None


def _renamed(part):
    """A part of a stored recipe with the names that its fields have in this version."""
    if not isinstance(part, dict):
        return part
    return {RENAMED.get(key, key): _renamed(value) for key, value in part.items()}


def _difference(ours, theirs, part: str = "") -> str | None:
    """The first field in which a recipe differs from the stored one.

    A field that the stored recipe lacks, because an older version wrote it, may be anything.
    """
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return None if ours == theirs else f"{part}: expected {ours}, got {theirs}"
    for key, value in theirs.items():
        name = f"{part}.{key}" if part else key
        difference = _difference(ours[key], value, name) if key in ours else f"{name}: not expected"
        if difference:
            return difference
    return None
