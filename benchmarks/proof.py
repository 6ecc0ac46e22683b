"""The paper's claims, tried on the bundled world: `python benchmarks/proof.py drift --run RUN`.

RUN is a folder of `aapt train tiny-world`: every experiment starts from its stages. Each variant is
trained, exported and measured once per seed; a second call goes on where the first was stopped. The
result is a page and two pictures in `docs/proof/`.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from aapt.corruption import Corruption
from aapt.curriculum import constant
from aapt.evaluate import evaluate
from aapt.recipes import Recipe, StageConfig, tiny_world
from aapt.stages.adversarial import AdversarialConfig
from aapt.trainer import Run

Variants = Mapping[str, StageConfig]


@dataclass(frozen=True)
class Experiment:
    """Variants to compare.

    Attributes:
        question: What it answers.
        variants: Named stages; one may start from another.
        recipe: The recipe they belong to.
        beside: Stages of that recipe to measure as well.
    """

    question: str
    variants: Variants
    recipe: Recipe
    beside: tuple[str, ...] = ()


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
        },
        tiny_world(),
        beside=("regression",),
    )


def adversarial() -> Experiment:
    """The recipe's own last two stages, against more updates of the one before."""
    stages = tiny_world().stages
    regression = replace(stages["long-regression"], start="long-regression")
    return Experiment(
        "Does the adversarial stage earn its place? Both lines below the first continue it.",
        {"adversarial": stages["adversarial"], "more-regression": regression},
        tiny_world(),
        beside=("long-regression",),
    )


EXPERIMENTS: Mapping[str, Callable[[], Experiment]] = {
    "adversarial": adversarial,
    "drift": drift,
    "teacher-forcing": teacher_forcing,
    "teacher-forcing-unclamped": partial(teacher_forcing, clamp=None),
    "recycling": recycling,
    "no-recycling": partial(recycling, recycle=False),
    "stage-three": stage_three,
}
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


def train(experiment: Experiment, seed: int, shared: Path, out: Path) -> dict[str, Path]:
    """Checkpoint folders of all variants under one seed."""
    recipe = replace(experiment.recipe, seed=seed)
    recipe = replace(recipe, stages={**recipe.stages, **experiment.variants})
    run = Run(recipe, out, workers=1)
    run.claim()
    given = [stage for stage in experiment.recipe.stages if stage not in experiment.variants]
    for stage in ("encoder", "decoder", *recipe.data, *given):
        source, link = shared.resolve() / stage, out / stage
        if source.is_dir() and not link.exists():
            os.symlink(source, link)
    folders = {}
    for name in experiment.variants:
        if not run.result(name).is_file():
            run.run(name)
        folders[name] = out / "checkpoints" / name
        if not (folders[name] / "config.json").is_file():
            run.export(name, folders[name])
    return folders


def measure(experiment: Experiment, seed: int, shared: Path, out: Path) -> dict:
    """The evaluation's report on all variants under one seed, from its file if it is there."""
    folders = train(experiment, seed, shared, out)
    run = Run(replace(experiment.recipe, seed=seed), out, workers=1)
    beside = {name: out / "checkpoints" / name for name in experiment.beside}
    for name, folder in beside.items():
        if not (folder / "config.json").is_file():
            run.export(name, folder)
    report = out / "evaluation" / "report.json"
    if not report.is_file():
        checkpoints = [*beside.values(), *folders.values()]
        evaluate(checkpoints, report.parent, seed=seed, log=lambda line: print(line, flush=True))
    return json.loads(report.read_text())


def page(experiment: Experiment, name: str, reports: Mapping[int, dict]) -> str:
    """The result in Markdown: means over seeds, and how far seeds are apart."""
    lines = [
        f"# {name}",
        "",
        experiment.question,
        "",
        f"`python benchmarks/proof.py {name}`, seeds {', '.join(map(str, reports))}; 16 held-out "
        "worlds each. Means over seeds, with the largest distance of a seed from them.",
    ]
    for window in WINDOWS:
        lines += ["", f"## {window}", ""]
        lines += ["| | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |"]
        lines += ["|---" * (1 + len(COLUMNS)) + "|"]
        for variant in (*experiment.beside, *experiment.variants):
            found = [report["windows"][window][variant] for report in reports.values()]
            cells = (spread([each[field] for each in found], form) for _, field, form in COLUMNS)
            lines += [f"| {variant} | " + " | ".join(cells) + " |"]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    shown = form.format(mean)
    if len(known) > 1:
        shown += " ± " + form.format(max(abs(value - mean) for value in known))
    return shown


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
    reports = {}
    for seed in given.seeds:
        out = given.out / name / f"seed-{seed}"
        reports[seed] = measure(experiment, seed, given.run, out)
    given.docs.mkdir(parents=True, exist_ok=True)
    (given.docs / f"{name}.md").write_text(page(experiment, name, reports))
    first = given.out / name / f"seed-{given.seeds[0]}" / "evaluation"
    for picture in ("drift.png", "sheet.png"):
        shutil.copyfile(first / picture, given.docs / f"{name}-{picture}")


if __name__ == "__main__":
    main()
