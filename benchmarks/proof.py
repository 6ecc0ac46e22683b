"""The paper's claims, tried on the bundled world: `python benchmarks/proof.py drift --run RUN`.

RUN is a finished `aapt train tiny-world` folder: every experiment starts from its stages. Each
variant is trained and exported once; a second call goes on where the first was stopped.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from aapt.corruption import Corruption
from aapt.recipes import Recipe, StageConfig, tiny_world
from aapt.stages.adversarial import AdversarialConfig
from aapt.trainer import Run

Variants = Mapping[str, StageConfig]


@dataclass(frozen=True)
class Experiment:
    """Variants that differ in what is asked, and in nothing else.

    Attributes:
        question: What it answers.
        variants: Named stages; one may start from another.
        recipe: The recipe they belong to.
    """

    question: str
    variants: Variants
    recipe: Recipe


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
    extension = {"steps": 60, "discriminator_warmup": 20}
    return Experiment(
        "Does training on longer rollouts stop the drift of a minute? (paper, Table 5)",
        {
            "short": plain(),
            "extension-1": plain(start="short", segments=2, **extension),
            "extension-5": plain(start="extension-1", segments=6, **extension),
        },
        tiny_world(),
    )


def teacher_forcing() -> Experiment:
    forced = {"start": "consistency", "forcing": "teacher", "corruption": None}
    return Experiment(
        "Does teacher-forced adversarial training fail when it is rolled out? (paper, Figure 7)",
        {
            "student": plain(start="consistency"),
            "teacher": plain(**forced),
            "teacher-corrupted": plain(**{**forced, "corruption": Corruption()}),
        },
        tiny_world(),
    )


def teacher_forcing_unclamped() -> Experiment:
    forced = teacher_forcing()
    recipe = forced.recipe
    return replace(
        forced,
        question=forced.question + " Without the output clamp.",
        recipe=replace(recipe, model=replace(recipe.model, output_clamp=None)),
    )


EXPERIMENTS: Mapping[str, Callable[[], Experiment]] = {
    "drift": drift,
    "teacher-forcing": teacher_forcing,
    "teacher-forcing-unclamped": teacher_forcing_unclamped,
}


def train(experiment: Experiment, seed: int, shared: Path, out: Path) -> dict[str, Path]:
    """Checkpoint folders of all variants under one seed."""
    recipe = replace(experiment.recipe, seed=seed)
    recipe = replace(recipe, stages={**recipe.stages, **experiment.variants})
    run = Run(recipe, out, workers=1)
    run.claim()
    for stage in ("encoder", "decoder", *recipe.data, *experiment.recipe.stages):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--run", type=Path, required=True, help="folder of `aapt train tiny-world`")
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    experiment = EXPERIMENTS[given.experiment]()
    for seed in given.seeds:
        train(experiment, seed, given.run, given.out / given.experiment / f"seed-{seed}")


if __name__ == "__main__":
    main()
