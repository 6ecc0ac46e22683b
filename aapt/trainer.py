"""Runs a recipe: one folder per stage, one loop for all of them."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .checkpoint import load_module, read_tensors, save_config, save_module, save_tensors
from .data.clips import LatentClips
from .data.procedural import (
    ProceduralData,
    VideoClips,
    encode_clips,
    latent_clips,
    render_clips,
    to_video,
)
from .data.world import THEMES
from .recipes import Recipe
from .stages.adversarial import Adversarial, AdversarialConfig
from .stages.consistency_distillation import ConsistencyDistillation
from .stages.decoder import DecoderTraining, measure_latents
from .stages.diffusion_adaptation import DiffusionAdaptation
from .stages.rollout_regression import RolloutRegression
from .vae import CausalVAE
from .world_model import WorldModel

SAMPLE_IMAGE = Path(__file__).parent / "assets" / "sample.png"
SAMPLE_PROMPT = "desert dunes at sunset"
FIT_CLIPS = 60  # a linear map needs no more
STAGES = (
    "encoder",
    "encode",
    "decoder",
    "diffusion",
    "consistency",
    "regression",
    "encode_long",
    "adversarial",
    "extension",
)
MODELS = ("diffusion", "consistency", "regression", "adversarial", "extension")  # generators


class Stage(Protocol):
    """What the loop asks of a stage."""

    def step(self, data, step: int) -> dict[str, float]:
        """One update; returns its metrics."""

    def export(self) -> nn.Module:
        """The network to keep."""


class TrainingError(RuntimeError):
    """Training that cannot go on, and why."""


class Run:
    """One recipe in one folder. A stage whose result is in the folder is not run again."""

    def __init__(self, recipe: Recipe, out: Path, workers: int):
        self.recipe, self.out, self.workers = recipe, out, workers

    def claim(self) -> None:
        """Write the recipe into the folder, or check that it is the one already there.

        ValueError naming the first part that differs: results of two recipes never mix.
        """
        ours = json.loads(json.dumps(asdict(self.recipe)))
        path = self.out / "recipe.json"
        if not path.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(ours, indent=2) + "\n")
            return
        theirs = json.loads(path.read_text())
        for part in ours:
            if theirs.get(part) != ours[part]:
                raise ValueError(
                    f"{path}: {part}: expected {ours[part]}, got {theirs.get(part)}; "
                    "train another recipe in another folder"
                )

    def result(self, stage: str) -> Path:
        return self.out / stage / "weights.safetensors"

    def vae(self, stage: str) -> CausalVAE:
        vae = CausalVAE(self.recipe.vae)
        load_module(self.result(stage), vae)
        return vae

    def model(self, stage: str | None) -> WorldModel:
        """A new model, with the weights that `stage` has made."""
        model = WorldModel(self.recipe.model, self.recipe.camera)
        if stage is not None:
            load_module(self.result(stage), model)
        return model

    def clips(self, stage: str) -> LatentClips:
        """The latents that one of the encoding stages has made."""
        return latent_clips(read_tensors(self.result(stage)))

    def encoder(self) -> None:
        """A linear encoder in closed form, and the scale of its latents."""
        data = VideoClips(render_clips(self.recipe.data, FIT_CLIPS, self.workers))
        vae = CausalVAE(self.recipe.vae)
        vae.linear.fit(to_video(data.videos))
        measure_latents(vae, (to_video(video[None]) for video in data.videos))
        save_module(self.result("encoder"), vae)

    def encode(self) -> None:
        self.encode_data("encode", self.recipe.data)

    def encode_long(self) -> None:
        """Longer clips, for rollouts of several segments."""
        self.encode_data("encode_long", self.recipe.long_data)

    def encode_data(self, stage: str, data: ProceduralData) -> None:
        clips = render_clips(data, data.clips, self.workers)
        save_tensors(self.result(stage), encode_clips(self.vae("encoder"), clips))

    def decoder(self) -> None:
        recipe = self.recipe
        data = VideoClips(render_clips(recipe.data, recipe.data.video_clips, self.workers))
        stage = DecoderTraining(recipe.decoder, self.vae("encoder"), recipe.seed)
        save_module(
            self.result("decoder"),
            self.loop("decoder", stage, data, recipe.decoder.schedule.steps),
        )

    def diffusion(self) -> None:
        config = self.recipe.diffusion
        stage = DiffusionAdaptation(config, self.model(None), self.recipe.seed)
        self.train("diffusion", stage, config.schedule.steps)

    def consistency(self) -> None:
        config = self.recipe.consistency
        stage = ConsistencyDistillation(config, self.model("diffusion"), self.recipe.seed)
        self.train("consistency", stage, config.schedule.steps)

    def regression(self) -> None:
        config = self.recipe.regression
        deviation = self.vae("encoder").pixel_deviation()
        stage = RolloutRegression(config, self.model("consistency"), deviation, self.recipe.seed)
        self.train("regression", stage, config.schedule.steps)

    def adversarial(self) -> None:
        recipe = self.recipe
        self.train_adversarial("adversarial", recipe.adversarial, "regression", recipe.seed)

    def extension(self) -> None:
        """Once more, with a discriminator that starts over."""
        recipe = self.recipe
        self.train_adversarial("extension", recipe.extension, "adversarial", recipe.seed + 1)

    def train_adversarial(
        self, name: str, config: AdversarialConfig, start: str, seed: int
    ) -> None:
        stage = Adversarial(
            config,
            self.model(start),
            self.model("diffusion"),
            self.vae("encoder").pixel_deviation(),
            seed,
        )
        self.train(name, stage, config.discriminator_schedule.steps, "encode_long")

    def train(self, name: str, stage: Stage, steps: int, clips: str = "encode") -> None:
        save_module(self.result(name), self.loop(name, stage, self.clips(clips), steps))

    def loop(self, name: str, stage: Stage, data, steps: int) -> nn.Module:
        """`steps` updates, each a line of metrics in the stage's folder."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        with Progress(*columns) as progress, (folder / "metrics.jsonl").open("w") as log:
            task = progress.add_task(name, total=steps, metrics="")
            start = time.perf_counter()
            for step in range(steps):
                try:
                    metrics = stage.step(data, step)
                except RuntimeError as error:
                    raise TrainingError(f"{name}: step {step}: {error}") from error
                elapsed = time.perf_counter() - start
                log.write(
                    json.dumps({"step": step, "seconds": round(elapsed, 2), **metrics}) + "\n"
                )
                log.flush()
                if not all(map(math.isfinite, metrics.values())):
                    raise TrainingError(f"{name}: step {step}: expected finite metrics: {metrics}")
                shown = " ".join(f"{key} {value:.4g}" for key, value in metrics.items())
                progress.update(task, advance=1, metrics=shown)
        return stage.export()

    def export(self, stage: str) -> Path:
        """A checkpoint folder that StreamingGenerator loads, in bfloat16."""
        recipe = self.recipe
        folder = self.out / recipe.name
        save_module(folder / "model.safetensors", self.model(stage), torch.bfloat16)
        vae = "decoder" if self.result("decoder").is_file() else "encoder"
        save_module(folder / "vae.safetensors", self.vae(vae), torch.bfloat16)
        shutil.copyfile(SAMPLE_IMAGE, folder / SAMPLE_IMAGE.name)
        save_config(
            folder,
            {
                "name": recipe.name,
                "stage": stage,
                "height": recipe.data.height,
                "width": recipe.data.width,
                "fps": 24,
                "prompts": [theme.prompts[0] for theme in THEMES],
                "sample": {"image": SAMPLE_IMAGE.name, "prompt": SAMPLE_PROMPT},
                "model": asdict(recipe.model),
                "camera": asdict(recipe.camera),
                "vae": asdict(recipe.vae),
            },
        )
        return folder


def run(
    recipe: Recipe,
    out: Path,
    stages: Sequence[str] = STAGES,
    *,
    workers: int = 2,
    report: Callable[[str], None] = print,
) -> Path:
    """Run `stages` of a recipe in `out`, skipping those already done, and export a checkpoint.

    Returns the checkpoint's folder. Raises TrainingError when a metric or a gradient is not
    finite, ValueError for an unknown stage or a folder that holds another recipe.
    """
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}, got {stage}")
    run_ = Run(recipe, out, workers)
    run_.claim()
    for stage in stages:
        if run_.result(stage).is_file():
            report(f"{stage}: already done")
            continue
        torch.manual_seed(recipe.seed)
        start = time.perf_counter()
        getattr(run_, stage)()
        report(f"{stage}: {(time.perf_counter() - start) / 60:.1f} min")
    done = [stage for stage in MODELS if run_.result(stage).is_file()]
    return run_.export(done[-1]) if done else out
