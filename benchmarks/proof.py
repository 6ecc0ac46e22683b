"""The paper's claims, tried on the bundled world: `python benchmarks/proof.py drift --run RUN`.

RUN is a folder of `aapt train tiny-world`; every experiment starts from stages of that run. Each
variant is trained, exported and measured once per seed. A second call resumes where the first was
stopped; two calls at once are refused. The result is a page and two images in `docs/proof/`. The
section "Reading" at the end of a page is written by hand, and a new result keeps it.
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
from aapt.lock import folder_lock
from aapt.model.config import SamplingConfig
from aapt.runs.run import Run
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.rollout import roll_out
from aapt.training.corruption import Corruption
from aapt.training.curriculum import constant
from aapt.training.forcing import Forcing
from aapt.training.optimization import Schedule
from aapt.training.recipe import Recipe, StageConfig
from aapt.training.recipes import tiny_world
from aapt.training.stages.adversarial import AdversarialConfig

Variants = Mapping[str, StageConfig]


@dataclass(frozen=True)
class Experiment:
    """Variants to compare.

    Attributes:
        question: question that the comparison answers.
        variants: stages by name; one may start from another.
        recipe: recipe that gives the variants their model and data.
        beside: names of stages of `recipe` to measure too.
        samplings: settings, by name, to sample the recipe's diffusion stage with and measure too.
        starts, seconds: worlds per evaluation, and length of each video.
        windows: windows of the evaluation that the page shows.
        timed: True to measure passes and time per frame; always with `samplings`.
    """

    question: str
    variants: Variants
    recipe: Recipe
    beside: tuple[str, ...] = ()
    samplings: Mapping[str, SamplingConfig] = field(default_factory=dict)
    starts: int = 16
    seconds: float = 60.0
    windows: tuple[str, ...] = ("4-6 s", "55-60 s")
    timed: bool = False


def plain(**changes) -> AdversarialConfig:
    """Stage 3 of the paper, without errors against the real clip, brief enough for a CPU."""
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
    """Extensions of one short training, equal in updates, different in the length of rollouts."""
    further = dict(steps=60, discriminator_warmup=20, overlap_frames=2)
    longer = plain(start="short", discriminator_start="short", **further)
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
        "Does a generator fail in a rollout after teacher-forced adversarial training? "
        "(paper, Figure 7) "
        f"Output clamp: {clamp}.",
        variants,
        replace(recipe, model=replace(recipe.model, output_clamp=clamp)),
        beside=("consistency",),
    )


def from_scratch(
    question: str,
    camera: Mapping[str, object] | None = None,
    forcing: Forcing = "teacher",
    timed: bool = False,
    **model: object,
) -> Experiment:
    """All stages in brief, for a model with other inputs than the recipe's; under diffusion forcing
    the first two. camera, model: fields that differ from the recipe's."""
    recipe = tiny_world()
    changed = replace(recipe.camera, **camera or {}), replace(recipe.model, **model)
    brief = constant("clips", frames=10, batch=8, steps=1000)
    stages = recipe.stages
    second = replace(stages["consistency"], start="brief-diffusion", forcing=forcing)
    variants = {
        "brief-diffusion": replace(stages["diffusion"], curriculum=brief, forcing=forcing),
        "brief-consistency": second,
        "student": plain(start="brief-consistency", discriminator_start="brief-diffusion"),
    }
    if forcing == "diffusion":
        del variants["student"]
    made = replace(recipe, camera=changed[0], model=changed[1], stages={})
    return Experiment(question, variants, made, timed=timed)


def stage_three() -> Experiment:
    """One factor of the adversarial stage at a time."""
    base = plain()
    return Experiment(
        "What matters in the adversarial stage? Every line below `base` changes one thing of it.",
        {
            "base": base,
            "from-consistency": replace(base, start="consistency"),
            "no-corruption": replace(base, corruption=None),
            "no-warm-up": replace(base, discriminator_warmup=0),
            "paper-penalty": replace(base, penalty=1000.0),
            "logit-per-clip": replace(base, judgement="clip"),
            "average-of-tokens": replace(base, pooling="average"),
            "judge-sees-no-past": replace(base, discriminator_recycled=False),
        },
        tiny_world(),
        beside=("regression",),
    )


def stage_three_unclamped() -> Experiment:
    """The base of `stage_three` in a model without the output clamp."""
    recipe = tiny_world()
    return Experiment(
        "What does the output clamp do in an adversarial stage that starts from student-forced "
        "regression?",
        {"base": plain()},
        replace(recipe, model=replace(recipe.model, output_clamp=None)),
        beside=("regression",),
    )


def many_segments() -> Experiment:
    """An extension of `drift` with 15 segments: rollouts of 15 s."""
    given = drift()
    extension = replace(given.variants["extension-5"], segments=15)
    return Experiment(
        "Do rollouts of fifteen segments streak?",
        {"short": given.variants["short"], "extension-14": extension},
        given.recipe,
    )


def against_regression(question: str, names: Sequence[str], updates: int) -> Experiment:
    """Adversarial stages of the recipe against `updates` more updates of regression. Each stage
    starts from the stage before; the first and the regression start from one model."""
    recipe = tiny_world()
    stages = {name: recipe.stages[name] for name in names}
    start = stages[names[0]].start
    regression = replace(recipe.stages[start], start=start, steps=updates)
    return Experiment(
        f"{question} Every line below the first starts from the first line's model.",
        {**stages, "more-regression": regression},
        recipe,
        beside=(start,),
    )


def colours() -> Experiment:
    recipe = tiny_world()
    final = recipe.stages["final"]
    return Experiment(
        "What keeps the colours in the last stage: its lead, up to "
        f"{final.lead_segments} segments rolled out before the judged ones, or its comparison of "
        "the mean colours of rows in place of whole frames? Every line below the first starts from "
        "the first line's model.",
        {
            "final": final,
            "no-lead": replace(final, lead_segments=0),
            "frames-not-rows": replace(final, palette=final.rows, rows=0.0),
        },
        recipe,
        beside=("further-adversarial",),
    )


def baselines() -> Experiment:
    """Trains nothing. Worlds and steps are few: 8 steps with guidance are 16 passes per frame."""
    recipe = tiny_world()
    shift = recipe.stages["diffusion"].shift
    guidances = {"diffusion-guidance-10": 10.0, "diffusion-guidance-3": 3.0, "diffusion": 1.0}
    return Experiment(
        "What does one forward pass per frame lose against many? Compared are the diffusion model "
        "of stage 1 (8 steps), the consistency model of stage 2, and the later stages. "
        "(paper, Figure 3 and Table 1)",
        {},
        recipe,
        beside=("consistency", "regression", "adversarial"),
        samplings={name: SamplingConfig(8, shift, w) for name, w in guidances.items()},
        starts=6,
    )


def without_discriminator() -> Experiment:
    """The last stage, and the same stage with a discriminator that the generator does not hear."""
    recipe = tiny_world()
    final = recipe.stages["final"]
    return Experiment(
        "Does the adversarial loss of the last stage do anything that its errors against the real "
        "clip, of latents and of rows, do not do alone?",
        {
            "final": final,
            "errors-alone": replace(final, adversarial=0.0),
            "adversarial-alone": replace(final, regression=0.0, rows=0.0),
        },
        recipe,
        beside=("further-adversarial",),
    )


def as_written() -> Experiment:
    """Trains from random weights: the clamps, the residual head and the corruption of `tiny_world`
    are off from the first stage on. Rates and updates suit a small model."""
    recipe = tiny_world()
    model = replace(recipe.model, output_clamp=None, residual_head=False, sink_distance="absolute")
    first = AdversarialConfig(
        clips="clips",
        steps=100,
        batch=4,
        segment_frames=10,
        shortest_segment=5,
        generator_schedule=Schedule(5e-5),
        discriminator_schedule=Schedule(2e-4),
        start="consistency",
        average=0.98,
    )
    extension = replace(
        first,
        steps=60,
        segments=2,
        overlap_frames=1,
        overlap_loss=True,
        start="first",
        discriminator_start="first",
    )
    further = replace(extension, segments=6, start="second", discriminator_start="second")
    stages = {name: recipe.stages[name] for name in ("diffusion", "consistency")}
    return Experiment(
        "What does the paper's stage 3 make of a small model, every switch as the paper has it?",
        {**stages, "first": first, "second": extension, "third": further},
        replace(recipe, model=model, stages={}, raw_starts=True),
    )


def one_thing(question: str, **changes: Mapping) -> Experiment:
    """The base of `stage_three`, and variants that each change some of its fields."""
    variants = {name.replace("_", "-"): plain(**fields) for name, fields in changes.items()}
    return Experiment(
        f"{question} Every line below `base` changes one thing of it.",
        {"base": plain(), **variants},
        tiny_world(),
        beside=("regression",),
    )


def five_minutes() -> Experiment:
    return Experiment(
        "Do five minutes hold, the controls included?",
        {},
        tiny_world(),
        beside=("regression", "further-adversarial", "final"),
        starts=6,
        seconds=300.0,
        windows=("4-6 s", "55-60 s", "175-180 s", "295-300 s"),
    )


# The residual head needs recycled frames, so both sides of the first question are without it.
RECYCLING = "What is lost without recycled frames? (paper, appendix E)"
CAMERA = "How should a model be given the rays of its camera? (paper, supplement G)"
FORCING = "What does one-step diffusion forcing cost beside recycled frames? (paper, Figure 2)"
WAN = {"block": "wan", "residual_head": False}  # the block that has a time per frame
EXPERIMENTS: Mapping[str, Callable[[], Experiment]] = {
    "adversarial": partial(
        against_regression,
        "Is the first adversarial stage better than more updates of regression?",
        ["adversarial"],
        210,
    ),
    "baselines": baselines,
    "drift": drift,
    "final": partial(
        against_regression,
        "Are the last adversarial stages better than more updates of regression?",
        ["further-adversarial", "final"],
        200,
    ),
    "teacher-forcing": teacher_forcing,
    "teacher-forcing-unclamped": partial(teacher_forcing, clamp=None),
    "recycling": partial(from_scratch, f"{RECYCLING} Recycled: yes.", residual_head=False),
    "no-recycling": partial(
        from_scratch, f"{RECYCLING} Recycled: no.", recycle=False, residual_head=False
    ),
    "camera": partial(from_scratch, f"{CAMERA} Origin and direction."),
    "camera-moment": partial(from_scratch, f"{CAMERA} Moment and direction.", {"rays": "moment"}),
    "camera-unscaled": partial(
        from_scratch,
        f"{CAMERA} Origin and direction, unscaled.",
        {"origin_deviation": 1.0, "direction_deviation": 1.0},
    ),
    "stage-three": stage_three,
    "stage-three-unclamped": stage_three_unclamped,
    "many-segments": many_segments,
    "colours": colours,
    "without-discriminator": without_discriminator,
    "as-written": as_written,
    "heads": partial(
        one_thing,
        "What do logits per frame, per clip and both keep?",
        per_clip={"judgement": "clip"},
        both={"judgement": "both"},
    ),
    "losses": partial(
        one_thing,
        "What do the relativistic loss and its penalties do, and do noised frames replace these?",
        non_saturating={"loss": "non-saturating"},
        real_alone={"penalized": "real"},
        none={"penalized": "none"},
        noised={"penalized": "none", "noised": True},
        known_too={"perturb_known": True},
    ),
    "discriminator-starts": partial(
        one_thing,
        "Which weights should the discriminator start from: diffusion, consistency or random ones?",
        from_consistency={"discriminator_start": "consistency"},
        from_random={"discriminator_start": None},
    ),
    "readings": partial(
        one_thing,
        "Do two readings of the paper matter: a token-frame for the first frame, windows that "
        "always start with their clip?",
        all_frames={"discriminator_layout": "all"},
        always={"first_frame": "always"},
    ),
    "five-minutes": five_minutes,
    "diffusion-forcing": partial(
        from_scratch,
        f"{FORCING} Forcing: diffusion.",
        forcing="diffusion",
        timed=True,
        **WAN | {"recycle": False},
    ),
    "recycled-frames": partial(from_scratch, f"{FORCING} Forcing: teacher.", timed=True, **WAN),
}
MINUTES = "minutes.json"
READING = "\n## Reading\n"
DEVIATIONS = "Figures are means over seeds ± the largest deviation of a seed from the mean."
LEGEND = (
    "Real video has a latent deviation and a sharpness of 1. Feature distance and palette error "
    "are better if smaller. Theme kept: share of worlds whose colours are nearest to their own "
    "theme. Yaw, forward: correlation of realised with commanded motion. Yaw gain: realised over "
    "commanded turn."
)
SHEET_WIDTH = 960
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
    recipe = replace(experiment.recipe, seed=seed)
    recipe = replace(recipe, stages={**recipe.stages, **experiment.variants})
    run = Run(recipe, out, workers=1)
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
    return Result(json.loads(report.read_text()), read(out / MINUTES), read(speeds))


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
    first = next(iter(results.values())).report
    settings, machine = first["settings"], first["environment"]
    lines = [
        f"# {name}",
        "",
        experiment.question,
        "",
        f"`python benchmarks/proof.py {name} --run RUN --seeds {seeds}`, with RUN a folder of "
        f"`aapt train tiny-world`. Per seed {settings['starts']} held-out worlds of "
        f"{settings['seconds']:g} s, decoded by the recipe's original decoder. "
        + (DEVIATIONS if len(results) > 1 else "One seed: small differences are not told apart."),
        "",
        LEGEND,
    ]
    parts = dict.fromkeys(part for result in results.values() for part in result.minutes)
    if parts:
        taken = {
            part: [r.minutes[part] for r in results.values() if part in r.minutes] for part in parts
        }
        shown = ", ".join(f"{part} {spread(minutes, '{:.1f}')}" for part, minutes in taken.items())
        lines += ["", f"CPU minutes ({machine['cpu']}, threads: {machine['threads']}): {shown}."]
    sources = (*experiment.beside, *experiment.variants, *experiment.samplings)
    for window in experiment.windows:
        lines += ["", f"## {window}", "", *heading(title for title, _, _ in COLUMNS)]
        for source in sources:
            found = [result.report["windows"][window][source] for result in results.values()]
            cells = (spread([each[field] for each in found], form) for _, field, form in COLUMNS)
            lines += [f"| {source} | " + " | ".join(cells) + " |"]
    if experiment.samplings or experiment.timed:
        lines += ["", "## Cost per latent frame, one stream without its decoder", ""]
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
    """Writes the page above its reading, and copies the images of the evaluation in `out`."""
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
