"""Runs a recipe: one folder per stage, one loop for all of them."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import (
    BUNDLED,
    load_config,
    load_module,
    read_tensors,
    save_config,
    save_module,
    save_tensors,
)
from ..clock import FPS, SHEET_SECONDS, STEPS_PER_SECOND
from ..data.clips import ClipBatch, Clips, VideoClips
from ..data.randomness import ClipRandom
from ..data.tiny_world.rendered_clips import encode_clips, latent_clips, render_clips
from ..data.tiny_world.themes import THEMES
from ..device import mixed_precision
from ..media.image import fit_image, load_image
from ..model.config import CameraConfig
from ..model.discriminator import Discriminator
from ..model.world_model import WorldModel
from ..training.recipes import Recipe, StageConfig
from ..training.stages import Stage
from ..training.stages.adversarial import Adversarial, AdversarialConfig
from ..training.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from ..training.stages.decoder import DecoderTraining, measure_latents
from ..training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from ..training.stages.light_decoder import LightDecoderTraining
from ..training.stages.rollout_regression import RolloutRegression, RolloutRegressionConfig
from ..vae import CausalVAE, VAEConfig
from ..vae.folder import LIGHT, ORIGINAL, lossless_dtype, save_vaes
from ..vae.pixels import to_pixels, to_video
from . import light_decoder
from .inputs import ANY_SET, Inputs, claim_inputs
from .loop import Habits, claim, drop_states, stored_recipe, train
from .parallel import Parallel
from .samples import sample_sheet

SAMPLE_IMAGE = BUNDLED / "sample.png"
SAMPLE_PROMPT = "desert dunes at sunset"
FIT_CLIPS = 60  # a linear map needs no more
DISCRIMINATOR = "discriminator.safetensors"  # in an adversarial stage's folder
SAMPLES = 3  # clips of a sheet
DIFFUSION_SAMPLES = (0, 1, 2, 4, 6)  # latent frames


def stage_names(recipe: Recipe) -> list[str]:
    """All stages of a recipe in order: the autoencoder's and the data's first."""
    made = ["encoder", *recipe.data, "decoder"] if recipe.vae else []
    light = [light_decoder.STAGE] if recipe.light_decoder else []
    return [*made, *light, *recipe.stages]


class EncodedSets(dict):
    """The clips that stages draw from by name, opened when they are first asked for."""

    def __init__(self, run: "Run"):
        super().__init__()
        self.run = run

    def __missing__(self, name: str) -> Clips:
        run = self.run
        if name in run.recipe.data:
            self[name] = latent_clips(read_tensors(run.result(name)))
            return self[name]
        self[name] = run.inputs.clips(name, run.recipe.camera)
        return self[name]


class Run:
    """One recipe in one folder. A stage whose result is in the folder is not run again.

    Args:
        workers: Processes that render clips.
        inputs: Clips for sets that the recipe does not make itself, weights to start from.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        workers: int = 2,
        *,
        parallel: Parallel | None = None,
        habits: Habits | None = None,
        inputs: Inputs | None = None,
    ):
        self.recipe, self.out, self.workers = recipe, out, workers
        self.parallel, self.habits = parallel or Parallel.single(), habits or Habits()
        self.inputs = inputs or Inputs()
        self.sets = EncodedSets(self)
        if recipe.scaled_camera:
            self.recipe = replace(recipe, camera=self.scaled_camera())

    def encoded_sets(self, stages: Iterable[str]) -> list[str]:
        """What stages draw from, and the recipe does not make."""
        needed = {clips for name in stages for clips in self.recipe.stages[name].needs}
        return sorted(needed - set(self.recipe.data))

    def scaled_camera(self) -> CameraConfig:
        """By the clips; in a folder that is claimed already, as it was."""
        claimed = stored_recipe(self.out)
        if claimed and claimed["camera"]:
            return CameraConfig(**claimed["camera"])
        return self.inputs.camera(self.recipe.camera, self.encoded_sets(self.recipe.stages))

    def claim(self, stages: Sequence[str] = ()) -> None:
        """Write the recipe, and what `stages` are given, into the folder, or check that they are
        those already there. Every rank calls it.

        ValueError naming the first part that differs: results of two recipes, or of other inputs,
        never mix. What the recipe of an older version does not say may be anything.
        """
        said = self.parallel.agree(self._claim(stages) if self.parallel.main else None)
        if said:
            raise ValueError(f"{said}; train in another folder")

    def _claim(self, stages: Sequence[str]) -> str | None:
        if said := claim(self.out, asdict(self.recipe)):
            return said
        waiting = self.waiting(stages)
        starts = any(self.recipe.stages[name].start is None for name in waiting)
        return claim_inputs(self.out, self.inputs.facts(self.encoded_sets(waiting), starts))

    def cut_captions(self, stages: Sequence[str]) -> list[str]:
        """A line for each set with captions that the model reads only the start of."""
        limit = self.recipe.model.text_tokens - 1  # of bytes: one token begins every prompt
        sets = self.encoded_sets(self.waiting(stages))
        counts = [(name, *self.inputs.long_captions(name, limit)) for name in sets]
        return [
            f"{name}: {cut} of {clips} clips have captions cut at {limit} bytes"
            for name, cut, clips in counts
            if cut
        ]

    def waiting(self, stages: Sequence[str]) -> list[str]:
        """Those of `stages` that train a generator and are still to come."""
        return [n for n in stages if n in self.recipe.stages and not self.result(n).is_file()]

    def check(self, stages: Sequence[str]) -> None:
        """What would stop stages that are still to come, said before the first of them runs:
        ValueError for clips that are missing or too short, that are not moved by what the model is
        conditioned on or are latents of several autoencoders, and for batches that ranks cannot
        share."""
        encoded = self.encoded_sets(self.recipe.stages)
        for name in self.inputs.latents:
            if name not in encoded and not (name == ANY_SET and encoded):
                raise ValueError(
                    f"latents: expected clips of {', '.join(encoded) or 'no set'}, which "
                    f"{self.recipe.name} does not make itself, got {name or 'a folder'}"
                )
        digests = {}
        for name in self.waiting(stages):
            config = self.recipe.stages[name]
            for before in {config.start, getattr(config, "judge", None)} - {None, *stages}:
                if not self.result(before).is_file():
                    raise ValueError(
                        f"stage {name}: expected the result of {before} in {self.out}, got none"
                    )
            for batch in config.batches:
                self.parallel.clips(batch)
            for clips, needed in config.needs.items():
                if clips not in self.recipe.data:
                    model = self.recipe.model
                    given = model.condition_channels, self.recipe.camera
                    digests[clips] = self.inputs.check(clips, *given)
                made = self.recipe.data.get(clips)
                has = made.latent_frames - 1 if made else self.sets[clips].latent_frames
                if has < needed:
                    raise ValueError(
                        f"{clips}: expected clips of {needed} latent frames or more after the "
                        f"first for stage {name}, got at most {has}"
                    )
        if len(set(digests.values())) > 1:
            raise ValueError(
                f"latents: expected those of one autoencoder for {', '.join(digests)}, "
                f"got {len(set(digests.values()))}"
            )

    def result(self, stage: str) -> Path:
        return self.out / stage / "weights.safetensors"

    def vae(self, stage: str) -> CausalVAE:
        if stage == light_decoder.STAGE:
            vae = light_decoder.new_light(self.recipe.light_decoder, CausalVAE(self.recipe.vae))
        else:
            vae = CausalVAE(self.recipe.vae)
        load_module(self.result(stage), vae)
        return vae

    def autoencoder(self, clips: str) -> CausalVAE:
        """The best there is by now for the latents of a set."""
        if self.recipe.vae is None:
            return self.inputs.autoencoder(clips)
        decoders = [s for s in (light_decoder.STAGE, "decoder") if self.result(s).is_file()]
        return self.vae([*decoders, "encoder"][0])

    def model(self, stage: str | None) -> WorldModel:
        """A new model with the weights that `stage` has made."""
        model = WorldModel(self.recipe.model, self.recipe.camera)
        if stage is not None:
            load_module(self.result(stage), model)
        elif self.inputs.weights is not None:
            model.load_start(self.inputs.weights)
        return model

    def run(self, stage: str) -> None:
        """Make the result of one stage. Every rank calls it."""
        torch.manual_seed(self.recipe.seed)
        if stage in self.recipe.stages:
            self.train(stage)
        elif self.parallel.main:
            self.prepare(stage)
        self.parallel.agree(None)  # the others wait for the file

    def prepare(self, stage: str) -> None:
        """The autoencoder, or a set of clips: what one rank makes alone."""
        if stage == "encoder":
            save_module(self.result(stage), self.fit_encoder())
        elif stage == "decoder":
            config, folder = self.recipe.decoder, self.out / stage
            data = self.videos(self.recipe.data[config.clips].video_clips)
            alone = Parallel.single(self.parallel.device)
            decoder = DecoderTraining(config, self.vae("encoder").to(alone.device))
            given = {"seed": self.recipe.seed, "parallel": alone}
            made = train(decoder, {config.clips: data}, folder, **given, habits=self.habits)
            save_module(self.result(stage), made)
            drop_states(folder)
        elif stage == light_decoder.STAGE:
            self.lighten()
        else:
            clips = render_clips(self.recipe.data[stage], self.workers)
            save_tensors(self.result(stage), encode_clips(self.vae("encoder"), clips))

    def lighten(self) -> None:
        """A light decoder for the autoencoder."""
        config, alone = self.recipe.light_decoder, Parallel.single(self.parallel.device)
        original = self.vae("decoder").to(alone.device)
        stage = LightDecoderTraining(config, original, light_decoder.new_light(config, original))
        data = self.videos(self.recipe.data[config.clips].video_clips)
        folder = self.out / light_decoder.STAGE
        light_decoder.train_light(stage, data, folder, self.recipe.seed, alone, self.habits)

    def fit_encoder(self) -> CausalVAE:
        """A linear encoder in closed form, and the scale of its latents."""
        data = self.videos(FIT_CLIPS)
        vae = CausalVAE(self.recipe.vae)
        vae.linear.fit(to_video(data.videos))
        measure_latents(vae, (to_video(video[None]) for video in data.videos))
        return vae

    def videos(self, count: int) -> VideoClips:
        clips = render_clips(self.recipe.data[self.recipe.decoder.clips], self.workers, count)
        return VideoClips((clip.video for clip in clips), count)

    def train(self, name: str) -> None:
        """Train one generator, on all ranks together."""
        parallel, folder = self.parallel, self.out / name
        stage = self.stage(self.recipe.stages[name])
        given = {"seed": self.recipe.seed, "parallel": parallel, "habits": self.habits}
        made = train(stage, self.sets, folder, **given, sample=self.sampler(name, stage))
        if isinstance(stage, Adversarial):
            self.save(folder / DISCRIMINATOR, stage.discriminator)
        self.save(self.result(name), made)
        drop_states(folder)

    def save(self, path: Path, network: nn.Module) -> None:
        tensors = self.parallel.gather(network)
        if self.parallel.main:
            save_tensors(path, {name: x.contiguous() for name, x in tensors.items()})

    def stage(self, config: StageConfig) -> Stage:
        """A stage with its networks, sharded over the ranks. A generator that rolls out keeps its
        parameters gathered (SPEC 11)."""
        match config:
            case DiffusionConfig():
                return DiffusionAdaptation(config, self.network(config.start))
            case ConsistencyConfig():
                networks = self.network(config.start), self.network(config.start)
                return ConsistencyDistillation(config, *networks)
            case RolloutRegressionConfig():
                model = self.network(config.start, rolls_out=True)
                return RolloutRegression(config, model, self.pixel_deviation())
            case AdversarialConfig():
                model = self.network(config.start, rolls_out=config.forcing == "student")
                judge = self.discriminator(config)
                self.place(judge, judge.world)
                return Adversarial(config, model, judge, self.pixel_deviation())

    def discriminator(self, config: AdversarialConfig) -> Discriminator:
        """From stage 1 with new logit heads, or the one that an adversarial stage has trained."""
        model = self.recipe.model
        if not config.judge_recycled:
            model = replace(model, recycle=False, residual_head=False)
        world = WorldModel(model, self.recipe.camera)
        judge = Discriminator(world, config.judgement, config.pooling)
        if isinstance(self.recipe.stages[config.judge], AdversarialConfig):
            load_module(self.out / config.judge / DISCRIMINATOR, judge)
        else:
            load_module(self.result(config.judge), judge.world)
        return judge

    def network(self, start: str | None, rolls_out: bool = False) -> WorldModel:
        model = self.model(start)
        self.place(model, model, rolls_out)
        return model

    def place(self, network: nn.Module, world: WorldModel, keep_gathered: bool = False) -> None:
        """On the device, and shared out over the ranks."""
        world.transformer.checkpoint_blocks = self.habits.checkpoint_blocks
        network.to(self.parallel.device)
        self.parallel.shard(network, keep_gathered)

    def pixel_deviation(self) -> Tensor:
        """How far a unit of each latent channel moves pixels; all alike without an autoencoder."""
        if self.recipe.vae is None:
            return torch.ones(self.recipe.model.latent_channels, device=self.parallel.device)
        return self.vae("encoder").pixel_deviation().to(self.parallel.device)

    def sampler(self, name: str, stage: Stage) -> Callable[[int], None]:
        """Draws `samples-<updates>.png` into a stage's folder: always the same clips and noise,
        from what the weights are at the time, as long as a stream of a minute.

        A diffusion stage shows what its checkpoint would: frames of many passes each. They are
        those of the first second, whose passes cost less than the minute of the others in a small
        model and a few times as much under the paper's 32 steps with guidance.
        """
        parallel, config = self.parallel, self.recipe.stages[name]
        batch, vae = self.shown(name)
        sampling, frames = None, [STEPS_PER_SECOND * second for second in SHEET_SECONDS]
        if isinstance(config, DiffusionConfig):
            sampling, frames = config.sampling, DIFFUSION_SAMPLES

        def sample(done: int) -> None:
            with mixed_precision(parallel.device):
                sheet = sample_sheet(stage.model, vae, batch, frames, sampling=sampling)
            parallel.reshard(stage.model)
            if parallel.main:
                sheet.save(self.out / name / f"samples-{done}.png")

        return sample

    def shown(self, stage: str) -> tuple[ClipBatch, CausalVAE]:
        """A few whole clips that a stage learns from, always the same and no more than go through
        its networks at once, and their autoencoder."""
        name = next(iter(self.recipe.stages[stage].needs))
        if self.recipe.decoder:
            name = self.recipe.decoder.clips
        count = min(SAMPLES, self.habits.clips_at_once or SAMPLES)
        random = ClipRandom(self.recipe.seed, 0, range(count), self.parallel.device)
        clips = self.sets[name]
        vae = self.autoencoder(name).to(self.parallel.device)
        return clips.sample(random, clips.latent_frames), vae

    def export(self, stage: str, folder: Path | None = None) -> Path:
        """A checkpoint folder that StreamingGenerator loads, in bfloat16; returns `folder`, which
        is named after the recipe unless given. That of a diffusion stage says how it is sampled.

        Its pictures have the size that positions are counted on (SPEC 4).
        """
        recipe, model, config = self.recipe, self.recipe.model, self.recipe.stages[stage]
        sampling = asdict(config.sampling) if isinstance(config, DiffusionConfig) else None
        folder = folder or self.out / recipe.name
        save_module(folder / "model.safetensors", self.model(stage), torch.bfloat16)
        vaes = self.export_vae(stage, folder)
        pixels = model.patch * VAEConfig(**vaes[LIGHT]).space_factor
        height, width = (pixels * tokens for tokens in model.reference_grid)
        prompt = self.export_sample(stage, folder, height, width)
        save_config(
            folder,
            {
                "name": recipe.name,
                "stage": stage,
                "sampling": sampling,
                "height": height,
                "width": width,
                "fps": FPS,
                "prompts": [theme.prompts[0] for theme in THEMES] if recipe.data else [],
                "sample": {"image": SAMPLE_IMAGE.name, "prompt": prompt},
                "model": asdict(model),
                "camera": recipe.camera and asdict(recipe.camera),
                **vaes,
            },
        )
        return folder

    def exported(self, stage: str) -> bool:
        """Whether the checkpoint is that of `stage` and newer than every result: its configuration
        is written last."""
        folder = self.out / self.recipe.name
        config = folder / "config.json"
        if not config.is_file() or load_config(folder).get("stage") != stage:
            return False
        results = filter(Path.is_file, map(self.result, stage_names(self.recipe)))
        return config.stat().st_mtime >= max(result.stat().st_mtime for result in results)

    def export_sample(self, stage: str, folder: Path, height: int, width: int) -> str:
        """A picture to start from, of the checkpoint's size; returns its prompt. Of the user's
        videos, a clip's first."""
        if self.recipe.data:
            picture, prompt = load_image(SAMPLE_IMAGE), SAMPLE_PROMPT
        else:
            batch, vae = self.shown(stage)
            with torch.no_grad():
                video = vae.decode(batch.latents[:1, :, :1])
            picture, prompt = Image.fromarray(to_pixels(video)[0, 0].numpy()), batch.prompts[0]
        pixels, _ = fit_image(picture, height, width)
        Image.fromarray(pixels).save(folder / SAMPLE_IMAGE.name)
        return prompt

    def export_vae(self, stage: str, folder: Path) -> dict[str, dict]:
        """The autoencoder, and the original one beside it if its decoder is a light one; returns
        what `config.json` says of them. One that was given stays bit for bit."""
        vaes = {LIGHT: self.autoencoder(next(iter(self.recipe.stages[stage].needs)))}
        if self.result(light_decoder.STAGE).is_file():
            vaes[ORIGINAL] = self.vae("decoder")
        dtype = torch.bfloat16 if self.recipe.vae else lossless_dtype(vaes[LIGHT])
        return save_vaes(folder, vaes, dtype)


def run(
    recipe: Recipe,
    out: Path,
    stages: Sequence[str] | None = None,
    *,
    report: Callable[[str], None] = print,
    **options,
) -> Path:
    """Run `stages` of a recipe in `out`, all unless given, skipping those already done, and export
    a checkpoint of the last generator there is, unless that is done too. `options`: of `Run`. Every
    rank calls it.

    Returns the checkpoint's folder. Raises TrainingError when a metric or a gradient is not
    finite, ValueError for an unknown stage or a folder that holds another recipe.
    """
    names = stage_names(recipe)
    for stage in stages or ():
        if stage not in names:
            raise ValueError(f"stages: expected some of {', '.join(names)}, got {stage}")
    run_ = Run(recipe, out, **options)
    run_.check(stages or names)
    run_.claim(stages or names)
    for line in run_.cut_captions(stages or names):
        report(line)
    for stage in stages or names:
        if run_.parallel.agree(run_.result(stage).is_file()):
            report(f"{stage}: already done")
            drop_states(run_.out / stage)  # of a run that was stopped right after its result
            continue
        start = time.perf_counter()
        run_.run(stage)
        report(f"{stage}: {(time.perf_counter() - start) / 60:.1f} min")
    done = [stage for stage in recipe.stages if run_.result(stage).is_file()]
    if done and run_.parallel.main and not run_.exported(done[-1]):
        run_.export(done[-1])
    run_.parallel.wait()
    return out / recipe.name if done else out
