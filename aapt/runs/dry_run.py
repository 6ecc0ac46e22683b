"""Tries every stage of a recipe with a few updates each, before a long run."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..lock import FolderInUse, folder_lock
from ..training.curriculum import Curriculum
from ..training.recipe import Recipe, StageConfig
from .loop import RECIPE, RunOptions
from .monitor import METRICS, read_metrics
from .parallel import Parallel
from .run import run

UPDATES = 2  # of each phase, one after a discriminator's warm-up: the last is timed
WARM = 1  # updates where an earlier stage of the kind has warmed the machine up
CLIPS = 2  # of a set that the recipe renders


def dry_run(
    recipe: Recipe,
    out: Path,
    *,
    report: Callable[[str], None] = print,
    parallel: Parallel,
    options: RunOptions,
    **arguments,
) -> None:
    """Make a few updates of every stage, save states, and report how long all updates take.

    Models, batches and rollouts have their full size, and stages hand their weights on, so errors
    and a lack of memory show. No sheets are drawn. Results are made in a folder beside `out`, and
    are removed. Every rank calls it. ValueError if another dry run is in that folder, or something
    else.

    Args:
        report: Called with a line per stage.
        arguments: Further arguments of `run`, and its errors.
    """
    out = out.absolute()  # "." has no name of its own
    folder = out.with_name(f"{out.name}.dry-run")
    brief = replace(options, save_every=1, sample_every=None)
    trouble = parallel.agree(_clear(folder) if parallel.main else None)
    if trouble:
        raise ValueError(trouble)
    left = folder if parallel.main else None
    try:
        given = {"report": _quiet, "parallel": parallel, "options": brief}
        run(shortened(recipe), folder, **given, **arguments)
        if not parallel.main:
            return
        total = 0.0
        for name, config in recipe.stages.items():
            metrics = folder / name / METRICS
            seconds = stage_seconds(config, metrics, is_warm(recipe, name))
            updates = sum(steps for steps, _ in timed(config))
            report(f"{name}: works; {updates} updates take {duration(seconds)}")
            total += seconds
        report(f"all stages: {duration(total)}, without clips, autoencoder and samples")
    except FolderInUse:  # another one has begun in the meantime: the folder is its
        left = None
        raise
    finally:
        if left:
            shutil.rmtree(left, ignore_errors=True)


def _clear(folder: Path) -> str | None:
    """Remove what a dry run left that was killed; return why not if that is not what is there."""
    if not folder.is_dir():
        return None
    if any(folder.iterdir()) and not (folder / RECIPE).is_file():
        return f"{folder}: expected what a dry run left, got something else; move it away"
    try:
        with folder_lock(folder):
            shutil.rmtree(folder)
    except FolderInUse as error:
        return str(error)
    return None


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with few updates and few clips; everything else has its size."""
    data = {
        name: replace(made, clips=CLIPS, video_clips=min(CLIPS, made.video_clips))
        for name, made in recipe.data.items()
    }
    return replace(
        recipe,
        data=data,
        decoder=recipe.decoder and replace(recipe.decoder, steps=UPDATES),
        light_decoder=recipe.light_decoder and replace(recipe.light_decoder, steps=UPDATES),
        stages={
            name: shortened_stage(config, is_warm(recipe, name))
            for name, config in recipe.stages.items()
        },
    )


def is_warm(recipe: Recipe, name: str) -> bool:
    """Return whether a stage of this kind comes before."""
    names = list(recipe.stages)
    kinds = [type(recipe.stages[before]) for before in names[: names.index(name)]]
    return type(recipe.stages[name]) in kinds


def shortened_stage(config: StageConfig, warm: bool = False) -> StageConfig:
    """A stage with UPDATES updates of each phase, WARM if it is `warm`; of a discriminator that is
    warmed up first, the first is its own, but for a stage that is warm.

    Of several critic updates per update of a generator two are left.
    """
    updates = WARM if warm else UPDATES
    if hasattr(config, "curriculum"):
        phases = (replace(phase, steps=updates) for phase in config.curriculum.phases)
        return replace(config, curriculum=Curriculum(tuple(phases)))
    if getattr(config, "discriminator_warmup", 0):
        return replace(config, discriminator_warmup=updates - 1, steps=1)
    if hasattr(config, "critic_updates"):
        config = replace(config, critic_updates=min(config.critic_updates, 2))
    return replace(config, steps=updates)


def timed(config: StageConfig, warm: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the updates of each phase, and which update of the shortened stage is timed for it.

    In a stage that is warm, an update of both networks stands for those of a discriminator alone,
    which take less.
    """
    updates = WARM if warm else UPDATES
    if getattr(config, "critic_updates", 1) > 1:  # of the critic alone, and of both
        yield config.steps * (config.critic_updates - 1), 2 * updates - 2
        yield config.steps, 2 * updates - 1
        return
    if warmup := getattr(config, "discriminator_warmup", 0):
        yield warmup, 0
    phases = config.curriculum.phases if hasattr(config, "curriculum") else [config]
    for index, phase in enumerate(phases, 1):
        yield phase.steps, index * updates - 1


def stage_seconds(config: StageConfig, metrics: Path, warm: bool = False) -> float:
    """Seconds of all updates of a stage, from the metrics of the shortened one."""
    ends = [0.0, *(line["seconds"] for line in read_metrics(metrics))]
    return sum(steps * (ends[index + 1] - ends[index]) for steps, index in timed(config, warm))


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _quiet(line: str) -> None:
    """Drop a line."""
