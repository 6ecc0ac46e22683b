"""Runs a recipe: one folder per stage, one loop for all of them."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .checkpoint import load_module, read_tensors, save_config, save_module, save_tensors
from .data.clips import Clips
from .data.procedural import VideoClips, encode_clips, latent_clips, render_clips, to_video
from .data.world import THEMES
from .discriminator import Discriminator
from .randomness import ClipRandom
from .recipes import Recipe, StageConfig
from .stages import Stage
from .stages.adversarial import Adversarial, AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from .stages.decoder import DecoderTraining, measure_latents
from .stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from .stages.rollout_regression import RolloutRegression, RolloutRegressionConfig
from .vae import CausalVAE
from .world_model import WorldModel

SAMPLE_IMAGE = Path(__file__).parent / "assets" / "sample.png"
SAMPLE_PROMPT = "desert dunes at sunset"
FIT_CLIPS = 60  # a linear map needs no more


class TrainingError(RuntimeError):
    """Training that cannot go on, and why."""


def stage_names(recipe: Recipe) -> list[str]:
    """All stages of a recipe in order: the autoencoder's and the data's first."""
    made = ["encoder", *recipe.data, "decoder"] if recipe.vae else []
    return [*made, *recipe.stages]


class EncodedSets(dict):
    """The recipe's clips by name, read when they are first asked for."""

    def __init__(self, run: "Run"):
        super().__init__()
        self.run = run

    def __missing__(self, name: str) -> Clips:
        self[name] = latent_clips(read_tensors(self.run.result(name)))
        return self[name]


class Run:
    """One recipe in one folder. A stage whose result is in the folder is not run again."""

    def __init__(self, recipe: Recipe, out: Path, workers: int):
        self.recipe, self.out, self.workers = recipe, out, workers
        self.sets = EncodedSets(self)

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

    def run(self, stage: str) -> None:
        """Make the result of one stage."""
        torch.manual_seed(self.recipe.seed)
        if stage in self.recipe.stages:
            made = self.train(stage, self.stage(self.recipe.stages[stage]), self.sets)
        elif stage == "encoder":
            made = self.fit_encoder()
        elif stage == "decoder":
            made = self.train_decoder()
        else:
            clips = render_clips(self.recipe.data[stage], self.workers)
            save_tensors(self.result(stage), encode_clips(self.vae("encoder"), clips))
            return
        save_module(self.result(stage), made)

    def fit_encoder(self) -> CausalVAE:
        """A linear encoder in closed form, and the scale of its latents."""
        data = VideoClips(self.videos(FIT_CLIPS))
        vae = CausalVAE(self.recipe.vae)
        vae.linear.fit(to_video(data.videos))
        measure_latents(vae, (to_video(video[None]) for video in data.videos))
        return vae

    def train_decoder(self) -> nn.Module:
        config = self.recipe.decoder
        data = VideoClips(self.videos(self.recipe.data[config.clips].video_clips))
        stage = DecoderTraining(config, self.vae("encoder"))
        return self.train("decoder", stage, {config.clips: data})

    def videos(self, count: int):
        return render_clips(self.recipe.data[self.recipe.decoder.clips], self.workers, count)

    def stage(self, config: StageConfig) -> Stage:
        model = self.model(config.start)
        match config:
            case DiffusionConfig():
                return DiffusionAdaptation(config, model)
            case ConsistencyConfig():
                return ConsistencyDistillation(config, model, self.model(config.start))
            case RolloutRegressionConfig():
                return RolloutRegression(config, model, self.pixel_deviation())
            case AdversarialConfig():
                judge = Discriminator(self.model(config.judge), config.judgement)
                return Adversarial(config, model, judge, self.pixel_deviation())

    def pixel_deviation(self) -> torch.Tensor:
        """How far a unit of each latent channel moves pixels; all alike without an autoencoder."""
        if self.recipe.vae is None:
            return torch.ones(self.recipe.model.latent_channels)
        return self.vae("encoder").pixel_deviation()

    def train(self, name: str, stage: Stage, sets: Mapping[str, Clips | VideoClips]) -> nn.Module:
        """All updates of a stage, each a line of metrics in the stage's folder."""
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
            task = progress.add_task(name, total=stage.steps, metrics="")
            start = time.perf_counter()
            for step in range(stage.steps):
                random = ClipRandom(self.recipe.seed, step, range(stage.batch(step)))
                try:
                    metrics = stage.accumulate(sets, random, step)
                    metrics |= stage.update(step)
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

    def export(self, stage: str, folder: Path | None = None) -> Path:
        """A checkpoint folder that StreamingGenerator loads, in bfloat16; returns `folder`, which
        is named after the recipe unless given."""
        recipe = self.recipe
        size = recipe.data[recipe.decoder.clips]
        folder = folder or self.out / recipe.name
        save_module(folder / "model.safetensors", self.model(stage), torch.bfloat16)
        vae = "decoder" if self.result("decoder").is_file() else "encoder"
        save_module(folder / "vae.safetensors", self.vae(vae), torch.bfloat16)
        shutil.copyfile(SAMPLE_IMAGE, folder / SAMPLE_IMAGE.name)
        save_config(
            folder,
            {
                "name": recipe.name,
                "stage": stage,
                "height": size.height,
                "width": size.width,
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
    stages: Sequence[str] | None = None,
    *,
    workers: int = 2,
    report: Callable[[str], None] = print,
) -> Path:
    """Run `stages` of a recipe in `out`, all unless given, skipping those already done, and export
    a checkpoint of the last generator there is.

    Returns the checkpoint's folder. Raises TrainingError when a metric or a gradient is not
    finite, ValueError for an unknown stage or a folder that holds another recipe.
    """
    names = stage_names(recipe)
    for stage in stages or ():
        if stage not in names:
            raise ValueError(f"stages: expected some of {', '.join(names)}, got {stage}")
    run_ = Run(recipe, out, workers)
    run_.claim()
    for stage in stages or names:
        if run_.result(stage).is_file():
            report(f"{stage}: already done")
            continue
        start = time.perf_counter()
        run_.run(stage)
        report(f"{stage}: {(time.perf_counter() - start) / 60:.1f} min")
    done = [stage for stage in recipe.stages if run_.result(stage).is_file()]
    return run_.export(done[-1]) if done and recipe.vae else out
