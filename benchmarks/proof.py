"""The paper's claims, tried on small worlds: `python -m benchmarks.proof drift --run RUN`.

RUN is a folder of `aapt train tiny-world`, or of `aapt train small-world`; every experiment starts
from stages of that run. Each variant is trained, exported and measured once per seed. A second call
resumes where the first was stopped; two calls at once are refused. What a seed measured is kept in
`benchmarks/results/proof`, and the page shows all seeds found there. The result is a page and two
images in `docs/proof/`. The section "Reading" at the end of a page is written by hand, and a new
result keeps it.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from aapt.checkpoint import load_config, save_config, write_json
from aapt.evaluate import evaluate
from aapt.lock import folder_lock
from aapt.media.contact_sheet import GAP, LINE
from aapt.runs.inputs import Inputs
from aapt.runs.run import Run
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.rollout import roll_out

from .proof_experiments import EXPERIMENTS, Experiment

MINUTES = "minutes.json"
READING = "\n## Reading\n"
DEVIATIONS = "Figures are means over seeds ± the largest deviation of a seed from the mean."
LEGEND = (
    "Real video has a latent deviation and a sharpness of 1. Feature distance and palette error "
    "are better if smaller. Theme kept: share of worlds whose colours are nearest to their own "
    "theme. Yaw, forward: correlation of realised with commanded motion. Yaw gain: realised over "
    "commanded turn."
)
SHEET_WIDTH, SHEET_WORLDS = 960, 6  # a world of each theme
COLUMNS = (
    ("latent deviation", "latent_deviation", "{:.2f}"),
    ("sharpness", "sharpness", "{:.2f}"),
    ("feature distance", "feature_distance", "{:.2f}"),
    ("palette error", "palette_error", "{:.3f}"),
    ("theme kept", "theme_kept", "{:.0%}"),
    ("yaw", "yaw_correlation", "{:.2f}"),
    ("forward", "forward_correlation", "{:.2f}"),
    ("yaw gain", "yaw_gain", "{:.2f}"),
)


@dataclass(frozen=True)
class Result:
    """Result of one seed.

    Attributes:
        report: report of the evaluation.
        minutes: CPU minutes of each part of the work, if recorded.
        speeds: forward passes and CPU milliseconds per latent frame, by checkpoint.
    """

    report: dict
    minutes: Mapping[str, float]
    speeds: Mapping[str, tuple[int, float]]


def train(experiment: Experiment, run: Run, shared: Path) -> None:
    """Trains the variants in the folder of `run`, with links to the shared stages."""
    run.claim()
    given = [stage for stage in experiment.recipe.stages if stage not in experiment.variants]
    for stage in ("encoder", "decoder", *run.recipe.data, *given):
        source, link = shared.resolve() / stage, run.out / stage
        if source.is_dir() and not link.exists():
            os.symlink(source, link)
    for name in experiment.variants:
        if not run.result(name).is_file():
            with counted(run.out, name):
                run.run(name)


def export(experiment: Experiment, run: Run) -> dict[str, Path]:
    """Exports every checkpoint to measure; returns their folders by name."""
    sources = {name: name for name in (*experiment.beside, *experiment.variants)}
    sources |= {name: "diffusion" for name in experiment.samplings}
    folders = {name: run.out / "checkpoints" / name for name in sources}
    for name, stage in sources.items():
        if not (folders[name] / "config.json").is_file():
            run.export(stage, folders[name])
        if sampling := experiment.samplings.get(name):
            config = load_config(folders[name])
            save_config(folders[name], config | {"sampling": asdict(sampling)})
    return folders


def measure(experiment: Experiment, seed: int, shared: Path, out: Path) -> Result:
    """Trains and measures all variants under one seed; existing files are not made again.

    FolderInUse while another process works in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        return _measure(experiment, seed, shared, out)


def _measure(experiment: Experiment, seed: int, shared: Path, out: Path) -> Result:
    # Each generator shows its own gains
    recipe = replace(experiment.recipe, seed=seed, motion_asked=(1.0, 1.0))
    recipe = replace(recipe, stages={**recipe.stages, **experiment.variants})
    weights, minutes = train_before(experiment, seed, shared, out)
    run = Run(recipe, out, workers=1, inputs=Inputs(weights=weights))
    train(experiment, run, shared)
    folders = export(experiment, run)
    report, speeds = out / "evaluation" / "report.json", out / "speeds.json"
    if not report.is_file():
        settings = {"starts": experiment.starts, "seconds": experiment.seconds, "seed": seed}
        with counted(out, "evaluation"):
            say = partial(print, flush=True)
            evaluate(list(folders.values()), report.parent, **settings, log=say)
    if (experiment.samplings or experiment.timed) and not speeds.is_file():
        write_json(speeds, {name: speed(folder) for name, folder in folders.items()})
    return Result(json.loads(report.read_text()), minutes | read(out / MINUTES), read(speeds))


def train_before(
    experiment: Experiment, seed: int, shared: Path, out: Path
) -> tuple[Path | None, Mapping[str, float]]:
    """Trains `experiment.before`; returns its weights and CPU minutes."""
    if not experiment.before:
        return None, {}
    recipe = replace(experiment.before, seed=seed)
    (stage,) = recipe.stages
    folder = out.parents[1] / recipe.name / out.name
    first = replace(experiment, recipe=replace(recipe, stages={}), variants=recipe.stages)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        run = Run(recipe, folder, workers=1)
        train(first, run, shared)
    return run.result(stage), {f"{recipe.name} {stage}": read(folder / MINUTES)[stage]}


def keep(experiment: Experiment, result: Result, path: Path) -> None:
    """Writes what the page needs of a seed's result, and of which experiment it is."""
    report = {part: result.report[part] for part in ("settings", "environment", "windows")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"experiment": digest(experiment), **asdict(replace(result, report=report))})


def kept(experiment: Experiment, folder: Path) -> dict[int, Result]:
    """Reads the results of all seeds, by seed. ValueError for one of another experiment."""
    found = {}
    for path in folder.glob("seed-*.json"):
        result = json.loads(path.read_text())
        if result.pop("experiment") != digest(experiment):
            raise ValueError(f"{path}: expected a seed of this experiment as it is now; remove it")
        found[int(path.stem.removeprefix("seed-"))] = Result(**result)
    return dict(sorted(found.items()))


def digest(experiment: Experiment) -> str:
    """Names what is trained and measured, whatever the question says."""
    facts = set_fields(asdict(experiment) | {"question": None})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def set_fields(facts):
    """Leaves out what is off (None, False, 0 or empty), so that a new switch changes no name."""
    if isinstance(facts, Mapping):
        return {name: set_fields(value) for name, value in facts.items() if value}
    return [set_fields(value) for value in facts] if isinstance(facts, list | tuple) else facts


@contextmanager
def counted(out: Path, part: str) -> Iterator[None]:
    """Adds the CPU minutes of a part of the work, child processes included, to a file."""
    begun = sum(os.times()[:4])
    try:
        yield
    finally:
        minutes = read(out / MINUTES)
        spent = (sum(os.times()[:4]) - begun) / 60
        write_json(out / MINUTES, {**minutes, part: round(minutes.get(part, 0) + spent, 2)})


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


@torch.inference_mode()
def speed(folder: Path, frames: int = 20) -> tuple[int, float]:
    """Measures one stream without its decoder: forward passes and CPU milliseconds per latent
    frame, the fastest of `frames` after the window is full."""
    generator = StreamingGenerator.from_pretrained(folder)
    model, sampling = generator.model, generator.sampling
    height, width = generator.latent_size
    latent = torch.zeros(1, model.config.latent_channels, 1, height, width)
    channels = torch.zeros(1, model.config.condition_channels, 1, height, width)
    text = model.text_encoder([generator.sample_prompt])
    before = model.config.window(model.config.token_grid(height, width)) + 1
    stream = roll_out(model, latent, text, lambda _: channels, before + frames, 0, sampling)
    times = [time.process_time() for _ in stream][before:]
    taken = min(after - begun for begun, after in zip(times, times[1:]))
    return sampling.passes if sampling else 1, round(1000 * taken, 2)


def page(experiment: Experiment, name: str, results: Mapping[int, Result]) -> str:
    """Formats the result in Markdown: means over seeds, and the largest deviation of a seed."""
    seeds = " ".join(map(str, results))
    settings = next(iter(results.values())).report["settings"]
    small = bool(experiment.recipe.autoencoder)
    lines = [
        f"# {name}",
        "",
        experiment.question,
        "",
        f"`python -m benchmarks.proof {name} --run RUN --seeds {seeds}`, with RUN a folder of "
        f"`aapt train {experiment.recipe.name}`. Per seed {settings['starts']} held-out worlds of "
        f"{settings['seconds']:g} s, decoded by the {'bundled' if small else 'original'} decoder. "
        + (DEVIATIONS if len(results) > 1 else "One seed: small differences are not told apart."),
        "",
        LEGEND,
    ]
    by_machine = machines(results.values())
    for machine, measured in by_machine.items():
        parts = dict.fromkeys(part for result in measured for part in result.minutes)
        taken = {part: [r.minutes[part] for r in measured if part in r.minutes] for part in parts}
        shown = ", ".join(f"{part} {spread(minutes, '{:.1f}')}" for part, minutes in taken.items())
        if shown:
            lines += ["", f"CPU minutes ({machine}): {shown}."]
    sources = (*experiment.beside, *experiment.variants, *experiment.samplings)
    for window in experiment.windows:
        lines += ["", f"## {window}", "", *heading(title for title, _, _ in COLUMNS)]
        for source in sources:
            found = [result.report["windows"][window][source] for result in results.values()]
            cells = (spread([each[field] for each in found], form) for _, field, form in COLUMNS)
            lines += [f"| {source} | " + " | ".join(cells) + " |"]
    if experiment.samplings or experiment.timed:
        lines += ["", "## Cost per latent frame, one stream without its decoder"]
        for machine, measured in by_machine.items():
            lines += ["", *heading(("forward passes", f"CPU ms ({machine})"))]
            for source in sources:
                passes, taken = zip(*(result.speeds[source] for result in measured))
                lines += [f"| {source} | {passes[0]} | {spread(taken, '{:.1f}')} |"]
    lines += ["", f"![Drift over time]({name}-drift.png)", "", f"![Frames]({name}-sheet.jpg)"]
    return "\n".join(lines) + "\n"


def machines(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Groups results by processor and threads, because their times are not of one kind."""
    found: dict[str, list[Result]] = {}
    for result in results:
        facts = result.report["environment"]
        found.setdefault(f"{facts['cpu']}, threads: {facts['threads']}", []).append(result)
    return found


def heading(titles: Iterable[str]) -> list[str]:
    titles = ["", *titles]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    shown = form.format(mean)
    if len(known) > 1:
        shown += " ± " + form.format(max(abs(value - mean) for value in known))
    return shown


def publish(
    experiment: Experiment, name: str, results: Mapping[int, Result], out: Path, docs: Path
):
    """Writes the page above its reading, and copies the images of the evaluation in `out`."""
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / f"{name}.md"
    _, mark, reading = (path.read_text() if path.is_file() else "").partition(READING)
    path.write_text(page(experiment, name, results) + mark + reading)
    shutil.copyfile(out / "drift.png", docs / f"{name}-drift.png")
    with Image.open(out / "sheet.png") as sheet:
        head = LINE + GAP
        share = min(1, SHEET_WORLDS / experiment.starts)
        sheet = sheet.crop((0, 0, sheet.width, head + round(share * (sheet.height - head))))
        sheet.thumbnail((SHEET_WIDTH, sheet.height))
        sheet.save(docs / f"{name}-sheet.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder that the experiment starts from"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--docs", type=Path, default=Path("docs/proof"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/proof"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    name = given.experiment
    experiment = EXPERIMENTS[name]()
    folders = {seed: given.out / name / f"seed-{seed}" for seed in given.seeds}
    for seed, out in folders.items():
        result = measure(experiment, seed, given.run, out)
        keep(experiment, result, given.results / name / f"seed-{seed}.json")
    results = kept(experiment, given.results / name)
    publish(experiment, name, results, folders[given.seeds[0]] / "evaluation", given.docs)


if __name__ == "__main__":
    main()
