"""The paper's claims, tried on the bundled world: `python benchmarks/proof.py drift --run RUN`.

RUN is a folder of `aapt train tiny-world`: every experiment starts from its stages. Each variant is
trained, exported and measured once per seed; a second call goes on where the first was stopped. The
result is a page and two pictures in `docs/proof/`. What stands in a page under the heading
"Reading", at its end, is written by hand and stays.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from aapt.checkpoint import load_config, save_config, write_json
from aapt.evaluate import evaluate
from aapt.model.config import SamplingConfig
from aapt.runs.run import Run
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.rollout import roll_out
from aapt.training.corruption import Corruption
from aapt.training.curriculum import constant
from aapt.training.recipes import Recipe, StageConfig, tiny_world
from aapt.training.stages.adversarial import AdversarialConfig

Variants = Mapping[str, StageConfig]


@dataclass(frozen=True)
class Experiment:
    """Variants to compare.

    Attributes:
        question: What it answers.
        variants: Named stages; one may start from another.
        recipe: The recipe they belong to.
        beside: Stages of that recipe to measure as well.
        samplings: Ways to sample its diffusion stage, by name, to measure as well.
        starts: Worlds of the evaluation.
    """

    question: str
    variants: Variants
    recipe: Recipe
    beside: tuple[str, ...] = ()
    samplings: Mapping[str, SamplingConfig] = field(default_factory=dict)
    starts: int = 16


def plain(**changes) -> AdversarialConfig:
    """Stage 3 as in the paper, without our errors against the clip, brief enough for a CPU."""
    config = replace(
        tiny_world().stages["adversarial"],
        start="regression",
        steps=100,
        discriminator_warmup=40,
        segments=1,
        whole_clips=False,
        regression=0.0,
        palette=0.0,
        corruption=Corruption(),
    )
    return replace(config, **changes)


def drift() -> Experiment:
    """All continue the same short training for as many updates, and differ in how far they roll."""
    further = dict(steps=60, discriminator_warmup=20, overlap_frames=2)
    longer = plain(start="short", judge="short", **further)
    return Experiment(
        "Does training on longer rollouts stop the drift of a minute? (paper, Table 5)",
        {
            "short": plain(),
            "extension-0": replace(longer, segments=1),
            "extension-1": replace(longer, segments=2),
            "extension-5": replace(longer, segments=6),
        },
        tiny_world(),
        beside=("regression",),
    )


def teacher_forcing(clamp: float | None = tiny_world().model.output_clamp) -> Experiment:
    recipe = tiny_world()
    variants = {
        f"{forcing}{'-corrupted' if corruption else ''}": plain(
            start="consistency", forcing=forcing, corruption=corruption
        )
        for forcing in ("student", "teacher")
        for corruption in (None, Corruption())
    }
    return Experiment(
        "Does teacher-forced adversarial training fail when it is rolled out? (paper, Figure 7) "
        f"Output clamp: {clamp}.",
        variants,
        replace(recipe, model=replace(recipe.model, output_clamp=clamp)),
        beside=("consistency",),
    )


def recycling(recycle: bool = True) -> Experiment:
    """From nothing, for a model without recycled frames is another model. Neither has the residual
    head, which needs them."""
    recipe = tiny_world()
    model = replace(recipe.model, recycle=recycle, residual_head=False)
    brief = constant("clips", frames=10, batch=8, steps=1000)
    stages = recipe.stages
    return Experiment(
        "What is lost without recycled frames? (paper, supplement G) "
        f"Recycled: {'yes' if recycle else 'no'}.",
        {
            "brief-diffusion": replace(stages["diffusion"], curriculum=brief),
            "brief-consistency": replace(stages["consistency"], start="brief-diffusion"),
            "student": plain(start="brief-consistency", judge="brief-diffusion"),
        },
        replace(recipe, model=model, stages={}),
    )


def stage_three() -> Experiment:
    """One factor of the adversarial stage at a time."""
    base = plain()
    return Experiment(
        "What makes the adversarial stage work? One change to the first line at a time.",
        {
            "base": base,
            "from-consistency": replace(base, start="consistency"),
            "no-corruption": replace(base, corruption=None),
            "no-warm-up": replace(base, discriminator_warmup=0),
            "paper-penalty": replace(base, penalty=1000.0),
            "logit-per-clip": replace(base, judgement="clip"),
            "average-of-tokens": replace(base, pooling="average"),
            "judge-sees-no-past": replace(base, judge_recycled=False),
        },
        tiny_world(),
        beside=("regression",),
    )


def stage_three_unclamped() -> Experiment:
    """The same base; the clamp is the model's and not the stage's."""
    recipe = tiny_world()
    return Experiment(
        "What does the output clamp do for the adversarial stage from student-forced regression?",
        {"base": plain()},
        replace(recipe, model=replace(recipe.model, output_clamp=None)),
        beside=("regression",),
    )


def many_segments() -> Experiment:
    """As the extensions of `drift`, and further: 15 s in a rollout."""
    given = drift()
    extension = replace(given.variants["extension-5"], segments=15)
    return Experiment(
        "Do rollouts of very many segments streak?",
        {"short": given.variants["short"], "extension-14": extension},
        given.recipe,
    )


def against_regression(question: str, names: Sequence[str], updates: int) -> Experiment:
    """Adversarial stages of the recipe, each from the one before, against about as many updates of
    the regression that the first starts from."""
    recipe = tiny_world()
    stages = {name: recipe.stages[name] for name in names}
    start = stages[names[0]].start
    regression = replace(recipe.stages[start], start=start, steps=updates)
    return Experiment(
        f"{question} All lines below the first continue it.",
        {**stages, "more-regression": regression},
        recipe,
        beside=(start,),
    )


def colours() -> Experiment:
    recipe = tiny_world()
    final = recipe.stages["final"]
    return Experiment(
        "What do colours owe to the last stage: that it rolls out up to "
        f"{final.lead_segments} segments before the ones it judges, or that it compares the mean "
        "colours of rows in place of whole frames? All lines below the first continue it.",
        {
            "final": final,
            "no-lead": replace(final, lead_segments=0),
            "frames-not-rows": replace(final, palette=final.rows, rows=0.0),
        },
        recipe,
        beside=("further-adversarial",),
    )


def baselines() -> Experiment:
    """Nothing is trained. Few worlds and steps: 8 with guidance are 16 passes for every frame."""
    recipe = tiny_world()
    shift = recipe.stages["diffusion"].shift
    guidances = {"diffusion-guidance-10": 10.0, "diffusion-guidance-3": 3.0, "diffusion": 1.0}
    return Experiment(
        "What does one forward pass per frame give up against many? The diffusion model of stage 1 "
        "(8 steps), the consistency-only model of stage 2, and what the later stages add. "
        "(paper, Figure 3 and Table 1)",
        {},
        recipe,
        beside=("consistency", "regression", "adversarial"),
        samplings={name: SamplingConfig(8, shift, w) for name, w in guidances.items()},
        starts=6,
    )


EXPERIMENTS: Mapping[str, Callable[[], Experiment]] = {
    "adversarial": partial(
        against_regression, "Does the adversarial stage earn its place?", ["adversarial"], 210
    ),
    "baselines": baselines,
    "drift": drift,
    "final": partial(
        against_regression,
        "Do the last adversarial stages earn their place?",
        ["further-adversarial", "final"],
        200,
    ),
    "teacher-forcing": teacher_forcing,
    "teacher-forcing-unclamped": partial(teacher_forcing, clamp=None),
    "recycling": recycling,
    "no-recycling": partial(recycling, recycle=False),
    "stage-three": stage_three,
    "stage-three-unclamped": stage_three_unclamped,
    "many-segments": many_segments,
    "colours": colours,
}
MINUTES = "minutes.json"
READING = "\n## Reading\n"
SHEET_WIDTH = 960
WINDOWS = ("4-6 s", "55-60 s")
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
    """What came out under one seed.

    Attributes:
        report: The evaluation's.
        minutes: CPU minutes of each part of the work, as far as they are known.
        speeds: Forward passes and CPU milliseconds per latent frame, of each checkpoint.
    """

    report: dict
    minutes: Mapping[str, float]
    speeds: Mapping[str, tuple[int, float]]


def train(experiment: Experiment, run: Run, shared: Path) -> None:
    """Makes the variants, beside the stages they start from."""
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
    """Checkpoint folders of all that is to be measured."""
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
    """All variants under one seed, trained and measured unless their files are there."""
    recipe = replace(experiment.recipe, seed=seed)
    recipe = replace(recipe, stages={**recipe.stages, **experiment.variants})
    run = Run(recipe, out, workers=1)
    train(experiment, run, shared)
    folders = export(experiment, run)
    report, speeds = out / "evaluation" / "report.json", out / "speeds.json"
    if not report.is_file():
        settings = {"starts": experiment.starts, "seed": seed}
        with counted(out, "evaluation"):
            say = partial(print, flush=True)
            evaluate(list(folders.values()), report.parent, **settings, log=say)
    if experiment.samplings and not speeds.is_file():
        write_json(speeds, {name: speed(folder) for name, folder in folders.items()})
    return Result(json.loads(report.read_text()), read(out / MINUTES), read(speeds))


@contextmanager
def counted(out: Path, part: str) -> Iterator[None]:
    """Adds the CPU minutes of a part of the work, its processes included, to a file."""
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
    """Forward passes and CPU milliseconds per latent frame of one stream, the decoder left out: the
    fastest of `frames` behind a full window."""
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
    """The result in Markdown: means over seeds, and how far seeds are apart."""
    seeds = " ".join(map(str, results))
    first = next(iter(results.values())).report
    settings, machine = first["settings"], first["environment"]
    lines = [
        f"# {name}",
        "",
        experiment.question,
        "",
        f"`python benchmarks/proof.py {name} --run RUN --seeds {seeds}`, RUN a folder of "
        f"`aapt train tiny-world`. {settings['starts']} held-out worlds of "
        f"{settings['seconds']:g} s for each seed, all through the recipe's original decoder."
        + (" Means over seeds ± the largest distance of a seed." if len(results) > 1 else ""),
    ]
    parts = dict.fromkeys(part for result in results.values() for part in result.minutes)
    if parts:
        taken = {
            part: [r.minutes[part] for r in results.values() if part in r.minutes] for part in parts
        }
        shown = ", ".join(f"{part} {spread(minutes, '{:.1f}')}" for part, minutes in taken.items())
        lines += ["", f"CPU minutes ({machine['cpu']}, threads: {machine['threads']}): {shown}."]
    sources = (*experiment.beside, *experiment.variants, *experiment.samplings)
    for window in WINDOWS:
        lines += ["", f"## {window}", "", *heading(title for title, _, _ in COLUMNS)]
        for source in sources:
            found = [result.report["windows"][window][source] for result in results.values()]
            cells = (spread([each[field] for each in found], form) for _, field, form in COLUMNS)
            lines += [f"| {source} | " + " | ".join(cells) + " |"]
    if experiment.samplings:
        lines += ["", "## Cost of a latent frame, one stream without the decoder", ""]
        lines += heading(("forward passes", "CPU ms"))
        for source in sources:
            passes, taken = zip(*(result.speeds[source] for result in results.values()))
            lines += [f"| {source} | {passes[0]} | {spread(taken, '{:.1f}')} |"]
    lines += ["", f"![Drift over time]({name}-drift.png)", "", f"![Frames]({name}-sheet.jpg)"]
    return "\n".join(lines) + "\n"


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
    """Writes the page, less its reading, and the pictures of the evaluation in `out`."""
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / f"{name}.md"
    _, mark, reading = (path.read_text() if path.is_file() else "").partition(READING)
    path.write_text(page(experiment, name, results) + mark + reading)
    shutil.copyfile(out / "drift.png", docs / f"{name}-drift.png")
    with Image.open(out / "sheet.png") as sheet:
        sheet.thumbnail((SHEET_WIDTH, sheet.height))
        sheet.save(docs / f"{name}-sheet.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--run", type=Path, required=True, help="folder of `aapt train tiny-world`")
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--docs", type=Path, default=Path("docs/proof"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    name = given.experiment
    experiment = EXPERIMENTS[name]()
    folders = {seed: given.out / name / f"seed-{seed}" for seed in given.seeds}
    results = {seed: measure(experiment, seed, given.run, out) for seed, out in folders.items()}
    publish(experiment, name, results, folders[given.seeds[0]] / "evaluation", given.docs)


if __name__ == "__main__":
    main()
