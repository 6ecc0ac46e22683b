"""Runs a recipe in a folder: one folder per stage, and one loop for all stages."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import (
    find_checkpoint,
    load_config,
    load_module,
    read_tensors,
    save_config,
    save_module,
    save_tensors,
)
from ..clock import FPS, FRAMES_PER_LATENT, SHEET_SECONDS
from ..data.clips import ClipBatch, Clips, VideoClips
from ..data.randomness import ClipRandom
from ..data.rendered import FirstImage, render_clips
from ..data.stored_text import StoredText
from ..device import mixed_precision
from ..media.image import fit_image
from ..model.config import CameraConfig, ModelConfig
from ..model.discriminator import Discriminator
from ..model.low_rank import LoRA, adapt, merged
from ..model.umt5 import UMT5TextEncoder
from ..model.world_model import WorldModel
from ..training.recipe import Recipe, StageConfig
from ..training.stages import Stage
from ..training.stages.adversarial import Adversarial, AdversarialConfig
from ..training.stages.consistency_distillation import ConsistencyConfig
from ..training.stages.decoder import DecoderTraining, fit_linear
from ..training.stages.diffusion_adaptation import DiffusionConfig
from ..vae import CausalVAE, VAEConfig
from ..vae.folder import LIGHT, ORIGINAL, load_vae, lossless_dtype, save_vaes, vae_digest
from ..vae.pixels import to_pixels
from . import growth, light_decoder
from .autoencoder import FIT_CLIPS
from .build_stage import build_stage, restrict
from .clip_sets import ClipSets
from .inputs import ANY_SET, Inputs, claim_vae, read_record, weights_file
from .loop import RunOptions, claim, drop_states, locked, stored_recipe, train
from .parallel import Parallel
from .plan import meta_stage
from .samples import DIFFUSION_SAMPLES, SAMPLES, LatentStatistics, measures, sample_sheet
from .stage_order import check_stages, stage_names, stages_needed

SAMPLE_IMAGE = "sample.png"  # in a checkpoint's folder
DISCRIMINATOR = "discriminator.safetensors"  # in an adversarial stage's folder
RAW = "raw.safetensors"  # the last weights of a stage whose result is their average


class Run:
    """One recipe in one folder. A stage whose result is in the folder is not run again.

    The methods follow the order of a run: check, networks, stages, samples, export.

    Args:
        workers: Processes that render clips.
        inputs: Clips of sets that the recipe does not make itself, and weights to start from.
    """

    # Check: everything that would stop a later stage, before the first one runs.

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        workers: int = 2,
        *,
        parallel: Parallel | None = None,
        options: RunOptions | None = None,
        inputs: Inputs | None = None,
    ):
        self.recipe, self.out, self.workers = recipe, out, workers
        self.parallel, self.options = parallel or Parallel.single(), options or RunOptions()
        self.inputs = inputs or Inputs()
        self.sets = ClipSets(self.clip_set)
        if recipe.scaled_camera:
            self.recipe = replace(recipe, camera=self.scaled_camera())

    def clip_set(self, name: str) -> Clips:
        """A set of clips that the run has made, or that it was given."""
        if name in self.recipe.data:
            return self.recipe.data[name].latent_clips(read_tensors(self.result(name)))
        return self.inputs.clips(name, self.recipe.camera)

    def encoded_sets(self, stages: Iterable[str]) -> list[str]:
        """Names of the sets that stages draw from and that the recipe does not make itself."""
        needed = {clips for name in stages for clips in self.recipe.stages[name].needs}
        return sorted(needed - set(self.recipe.data))

    def scaled_camera(self) -> CameraConfig:
        """The camera, scaled to the clips, or as an earlier run in the folder scaled it."""
        claimed = stored_recipe(self.out)
        if claimed and claimed["camera"]:
            return CameraConfig(**claimed["camera"])
        return self.inputs.camera(self.recipe.camera, self.encoded_sets(self.recipe.stages))

    def claim(self, stages: Sequence[str] = ()) -> None:
        """Record the recipe and the inputs of `stages` in the folder. Every rank calls it.

        If the folder has a record, it is compared: results of two recipes, or of other inputs,
        never mix. ValueError naming the first part that differs. A field that an older version did
        not record may be anything.
        """
        difference = self.parallel.agree(self._claim(stages) if self.parallel.main else None)
        if difference:
            raise ValueError(f"{difference}; train in another folder")

    def _claim(self, stages: Sequence[str]) -> str | None:
        if difference := claim(self.out, asdict(self.recipe)):
            return difference
        if self.recipe.autoencoder:
            if difference := claim_vae(self.out, vae_digest(self.vae("encoder"))):
                return difference
        unfinished = self.unfinished(stages)
        starts = self.inputs.starts(self.recipe.stages[name] for name in unfinished)
        return self.inputs.claim(self.out, self.encoded_sets(unfinished), starts)

    def cut_captions(self, stages: Sequence[str]) -> list[str]:
        """Lines for the user, one per set with captions that are longer than the model reads."""
        if self.recipe.model.text_encoder != "bytes":
            return []
        limit = self.recipe.model.text_tokens - 1  # bytes: one token begins every prompt
        sets = self.encoded_sets(self.unfinished(stages))
        counts = [(name, *self.inputs.long_captions(name, limit)) for name in sets]
        return [
            f"{name}: {cut} of {clips} clips have captions cut at {limit} bytes"
            for name, cut, clips in counts
            if cut
        ]

    def unfinished(self, stages: Sequence[str]) -> list[str]:
        """The stages among `stages` that train a generator and have no result yet."""
        return [n for n in stages if n in self.recipe.stages and not self.result(n).is_file()]

    def check(self, stages: Sequence[str]) -> None:
        """Check, before the first stage runs, everything that would stop a later one.

        ValueError for a missing result of an earlier stage, for numbers that a stage does not take,
        for clips that are missing or too short, for clips with another kind of motion than the
        model is conditioned on, for latents of several autoencoders or rates, and for batches that
        the ranks cannot share.
        """
        encoded = self.encoded_sets(self.recipe.stages)
        if self.recipe.model.text_encoder == "umt5":
            self.check_text()
        self.inputs.check_weights(self.recipe)
        self.inputs.check_vae(self.recipe)
        for name in self.inputs.latents:
            if name not in encoded and not (name == ANY_SET and encoded):
                raise ValueError(
                    f"latents: expected clips of {', '.join(encoded) or 'no set'}, which "
                    f"{self.recipe.name} does not make itself, got {name or 'a folder'}"
                )
        digests, rates = {}, {}
        for name in self.unfinished(stages):
            config = self.recipe.stages[name]
            meta_stage(self.recipe, name)
            for batch in config.batches:
                self.parallel.clips(batch)
            if config.offload and self.parallel.mesh is None:
                raise ValueError(
                    f"stages.{name}.offload: expected several ranks, got 1; start training with "
                    "torchrun, or leave out --memory offload"
                )
            for clips, needed in config.needs.items():
                if clips not in self.recipe.data:
                    model = self.recipe.model
                    given = model.condition_channels, self.recipe.camera
                    digests[clips] = self.inputs.check(clips, *given)
                    rates[clips] = self.inputs.fps(clips)
                made = self.recipe.data.get(clips)
                has = made.latent_frames - 1 if made else self.sets[clips].latent_frames
                if has < needed:
                    raise ValueError(
                        f"{clips}: expected clips of {needed} latent frames or more after the "
                        f"first for stage {name}, got at most {has}"
                    )
        Inputs.check_one_encoding(digests, rates)
        self.check_order(stages)

    def check_order(self, stages: Sequence[str]) -> None:
        """Check that the results that each of `stages` needs are there, or made before it."""
        made = set()
        for name in stages:
            if not self.result(name).is_file():
                for before in stages_needed(self.recipe, name, self.inputs.weights is not None):
                    if before not in made and not self.has_result(before):
                        raise ValueError(
                            f"stage {name}: expected the result of {before} in {self.out}, got "
                            f"none; train {before} first"
                        )
            made.add(name)

    def has_result(self, stage: str) -> bool:
        """Return whether a stage has left all that later stages take."""
        left = [self.result(stage)]
        left += [self.start(stage)] if stage in self.recipe.stages else []
        return all(file.is_file() for file in left)

    def check_text(self) -> None:
        """Check that the clips' captions have embeddings of the width that the model reads."""
        rows, width = self.stored_text(""), self.recipe.model.text_width
        if rows.shape[1] != width:
            raise ValueError(
                f"latents: expected embeddings of {width} channels, got {rows.shape[1]}; encode "
                "the videos anew with the model's text encoder"
            )

    # Networks: new ones, with the weights that stages made.

    def result(self, stage: str) -> Path:
        """The file that a finished stage leaves."""
        return self.out / stage / "weights.safetensors"

    def start(self, stage: str) -> Path:
        """The file with which a later stage starts."""
        averaged = getattr(self.recipe.stages[stage], "average", None) is not None
        return self.out / stage / RAW if averaged and self.recipe.raw_starts else self.result(stage)

    def vae(self, stage: str) -> CausalVAE:
        """Load the autoencoder that `stage` made, or the given one with that stage's decoder."""
        if self.recipe.autoencoder:
            return load_vae(
                self.inputs.vae_of(self.recipe), LIGHT if stage == light_decoder.STAGE else ORIGINAL
            )
        if stage == light_decoder.STAGE:
            vae = light_decoder.new_light(self.recipe.light_decoder, CausalVAE(self.recipe.vae))
        else:
            vae = CausalVAE(self.recipe.vae)
        load_module(self.result(stage), vae)
        return vae

    def autoencoder(self, clips: str) -> CausalVAE:
        """Load the best autoencoder made so far for the latents of a set."""
        if self.recipe.vae is None:
            return self.inputs.autoencoder(clips)
        if self.recipe.autoencoder:
            return self.vae(light_decoder.STAGE)
        decoders = [s for s in (light_decoder.STAGE, "decoder") if self.result(s).is_file()]
        return self.vae([*decoders, "encoder"][0])

    @cached_property
    def stored_text(self) -> StoredText:
        """The embeddings of the captions of all encoded sets."""
        sets = self.encoded_sets(self.recipe.stages)
        folders = {folder: None for name in sets for folder, _ in self.inputs.buckets(name)}
        return StoredText(list(folders))

    def world(self, config: ModelConfig) -> WorldModel:
        """Make a model with new weights. A text encoder without weights of its own looks up the
        embeddings that are stored beside the clips."""
        model = WorldModel(config, self.recipe.camera)
        if isinstance(model.text_encoder, UMT5TextEncoder):
            model.text_encoder.source = self.stored_text
        return model

    def model(self, stage: str) -> WorldModel:
        """Make a model with the weights that are the result of `stage`."""
        model = self.world(self.recipe.model)
        load_module(self.result(stage), model)
        return model

    def starting_model(self, stage: str | None) -> WorldModel:
        """Make a model to train on after `stage`; for None, with the weights of the run's start."""
        model = self.world(self.recipe.model)
        if stage is not None:
            load_module(self.start(stage), model)
        elif self.inputs.weights is not None:
            model.load_start(weights_file(self.inputs.weights), self.recipe.new_channels)
        elif self.recipe.grown:
            load_module(self.result(growth.STAGE), model)
        return model

    # Stages: the work that makes each result.

    def run(self, stage: str) -> None:
        """Make the result of one stage. Every rank calls it."""
        torch.manual_seed(self.recipe.seed)
        if stage in self.recipe.stages:
            self.train(stage)
        elif self.parallel.main:
            self.prepare(stage)
        self.parallel.agree(None)  # the others wait for the file

    def prepare(self, stage: str) -> None:
        """Make the result of a stage that needs one rank only."""
        if stage == "encoder":
            save_module(self.result(stage), self.fit_encoder())
        elif stage == "decoder":
            config, folder = self.recipe.decoder, self.out / stage
            data = self.videos(self.recipe.data[config.clips].video_clips)
            alone = Parallel.single(self.parallel.device)
            decoder = DecoderTraining(config, self.vae("encoder").to(alone.device))
            given = {"seed": self.recipe.seed, "parallel": alone}
            train(decoder, {config.clips: data}, folder, **given, options=self.options)
            save_module(self.result(stage), decoder.export())
            drop_states(folder)
        elif stage == light_decoder.STAGE:
            self.train_light_decoder()
        elif stage == growth.STAGE:
            grown = growth.grow(self.recipe, self.vae("encoder"), self.workers)
            save_module(self.result(stage), grown)
        else:
            data = self.recipe.data[stage]
            clips = render_clips(data, self.workers)
            save_tensors(self.result(stage), data.encode(self.vae("encoder"), clips))

    def train_light_decoder(self) -> None:
        """Train a light decoder for the autoencoder."""
        config, alone = self.recipe.light_decoder, Parallel.single(self.parallel.device)
        original = self.vae("decoder").to(alone.device)
        networks = original, light_decoder.new_light(config, original)
        data = self.videos(self.recipe.data[config.clips].video_clips)
        folder, seed = self.out / light_decoder.STAGE, self.recipe.seed
        light_decoder.train_light(config, networks, data, folder, seed, alone, self.options)

    def fit_encoder(self) -> CausalVAE:
        """Fit a linear encoder in closed form, and measure the scale of its latents."""
        available = self.recipe.data[self.recipe.decoder.clips].video_clips
        return fit_linear(self.recipe.vae, self.videos(min(FIT_CLIPS, available)).videos)

    def videos(self, count: int) -> VideoClips:
        """Render the first `count` clips that the autoencoder learns from."""
        clips = render_clips(self.recipe.data[self.recipe.decoder.clips], self.workers, count)
        return VideoClips((clip.video for clip in clips), count)

    def train(self, name: str) -> None:
        """Train a generator on all ranks together."""
        parallel, folder = self.parallel, self.out / name
        stage = build_stage(self.recipe.stages[name], self)
        given = {"seed": self.recipe.seed, "parallel": parallel, "options": self.options}
        train(stage, self.sets, folder, **given, sample=self.sampler(name, stage))
        if isinstance(stage, Adversarial):
            self.save(folder / DISCRIMINATOR, stage.discriminator)
        if (raw := self.start(name)) != self.result(name):
            self.save(raw, stage.model)
        self.save(self.result(name), stage.export())
        drop_states(folder)

    def save(self, path: Path, network: nn.Module) -> None:
        """Write a network, also a sharded one, with adaptations merged. Every rank calls it."""
        tensors = self.parallel.gather(network)
        if self.parallel.main:
            tensors = merged(network, tensors)
            save_tensors(path, {name: x.contiguous() for name, x in tensors.items()})

    def discriminator(self, config: AdversarialConfig) -> Discriminator:
        """Make the discriminator that an adversarial stage starts from, and place it on the device.

        Its weights are those of an adversarial stage's discriminator, or under new logit heads
        another stage's model or the run's start.
        """
        model, start = self.recipe.model, config.discriminator_start
        if not config.discriminator_recycled:
            model = replace(model, recycle=False, residual_head=False)
        world = self.world(model)
        discriminator = Discriminator(world, config.judgement, config.pooling)
        if start is None:
            if given := self.inputs.discriminator_weights or self.inputs.weights:
                world.load_start(weights_file(given), self.recipe.new_channels)
        elif isinstance(self.recipe.stages[start], AdversarialConfig):
            load_module(self.out / start / DISCRIMINATOR, discriminator)
        else:
            load_module(self.start(start), world)
        restrict(discriminator, config)
        self.place(config, discriminator, world)
        return discriminator

    def network(
        self,
        config: StageConfig,
        start: str | None,
        lora: LoRA | None = None,
        rolls_out: bool = False,
    ) -> WorldModel:
        """Make a generator that starts after `start`, adapt it, and place it on the device."""
        model = self.starting_model(start)
        if lora:
            adapt(model, lora)
        self.place(config, model, model, rolls_out)
        return model

    def place(
        self, config: StageConfig, network: nn.Module, world: WorldModel, kept: bool = False
    ) -> None:
        """Move a network to the device and shard it over the ranks."""
        world.transformer.checkpoint_blocks = self.options.checkpoint_blocks
        network.to(self.parallel.device)
        self.parallel.shard(network, kept, config.offload)

    def pixel_deviation(self) -> Tensor:
        """Deviation of pixels per unit of a latent channel, (C,); ones without an autoencoder."""
        if self.recipe.vae is None:
            return torch.ones(self.recipe.model.latent_channels, device=self.parallel.device)
        return self.vae("encoder").pixel_deviation().to(self.parallel.device)

    # Samples: sheets that show the weights of the moment.

    def sampler(self, name: str, stage: Stage) -> Callable[[int], dict[str, float]]:
        """A function that draws `samples-<updates>.png` into a stage's folder, and returns measures
        of the samples.

        The sheet shows a minute of rollout from the weights of the moment, always of the same clips
        and noise. A diffusion stage is sampled as its checkpoint is, with many passes per frame,
        for one second. In a small model these passes cost less than the minute of other stages;
        under the paper's 32 steps with guidance they cost a few times as much.
        """
        parallel, config = self.parallel, self.recipe.stages[name]
        (batch, vae), fps = self.sample_clips(name), self.fps(name)
        sampling, frames = None, [fps * second // FRAMES_PER_LATENT for second in SHEET_SECONDS]
        if isinstance(config, DiffusionConfig):
            sampling, frames = config.sampling, DIFFUSION_SAMPLES
        elif isinstance(config, ConsistencyConfig):
            sampling = config.sampling

        def sample(done: int) -> dict[str, float]:
            made = LatentStatistics()
            given = {"sampling": sampling, "fps": fps, "statistics": made}
            with mixed_precision(parallel.device):
                sheet = sample_sheet(stage.model, vae, batch, frames, **given)
            parallel.reshard(stage.model)
            if parallel.main:
                sheet.save(self.out / name / f"samples-{done}.png")
            return measures(made, batch.latents)

        return sample

    def fps(self, stage: str) -> int:
        """Video frames per second of the clips that a stage learns from."""
        name = next(iter(self.recipe.stages[stage].needs))
        return FPS if name in self.recipe.data else self.inputs.fps(name)

    def sample_clips(self, stage: str) -> tuple[ClipBatch, CausalVAE]:
        """Whole clips that a stage learns from, always the same, and their autoencoder; at most
        as many as the stage passes through its networks at once."""
        name = next(iter(self.recipe.stages[stage].needs))
        if self.recipe.decoder:
            name = self.recipe.decoder.clips
        count = min(SAMPLES, self.options.clips_at_once or SAMPLES)
        random = ClipRandom(self.recipe.seed, 0, range(count), self.parallel.device)
        clips, vae = self.sets[name], self.autoencoder(name).to(self.parallel.device)
        return clips.sample(random, clips.latent_frames), vae

    # Export: the checkpoint that streams.

    def export(self, stage: str, folder: Path | None = None) -> Path:
        """Write the checkpoint of a stage, in bfloat16, for StreamingGenerator to load.

        Its images have the size of `export_size`. The checkpoint of a diffusion stage says how it
        is sampled. One that began with another checkpoint's weights keeps that one's origin and
        text encoder. Returns `folder`, which has the recipe's name unless it is given.
        """
        recipe, model, config = self.recipe, self.recipe.model, self.recipe.stages[stage]
        sampling = getattr(config, "sampling", None)
        data = next(iter(recipe.data.values()), None)
        folder = folder or self.out / recipe.name
        save_module(folder / "model.safetensors", self.model(stage), torch.bfloat16)
        vaes = self.export_vae(stage, folder)
        height, width = self.export_size(stage, VAEConfig(**vaes[LIGHT]).space_factor)
        sample, *gallery = self.export_images(stage, folder, height, width)
        save_config(
            folder,
            {
                "name": recipe.name,
                "stage": stage,
                "sampling": sampling and asdict(sampling),
                "height": height,
                "width": width,
                "fps": self.fps(stage),
                "prompts": data.prompts if data else [],
                "sample": sample,
                **({"gallery": gallery} if gallery else {}),
                "model": asdict(model),
                "camera": recipe.camera and asdict(recipe.played_camera),
                **({"poses": True} if data and data.poses else {}),
                **vaes,
                **((read_record(self.out).get("weights") or {}).get("checkpoint", {})),
            },
        )
        return folder

    def exported(self, stage: str) -> bool:
        """True if the checkpoint is of `stage` and newer than every result.

        The time of its configuration counts, because that is written last.
        """
        folder = self.out / self.recipe.name
        config = folder / "config.json"
        if not config.is_file() or load_config(folder).get("stage") != stage:
            return False
        results = filter(Path.is_file, map(self.result, stage_names(self.recipe)))
        return config.stat().st_mtime >= max(result.stat().st_mtime for result in results)

    def export_size(self, stage: str, space_factor: int) -> tuple[int, int]:
        """Return the height and width in pixels of rendered clips; of other models those on which
        positions are counted (docs/method.md#4), or, without a reference grid, those of clips."""
        model = self.recipe.model
        if self.recipe.data:
            data = next(iter(self.recipe.data.values()))
            return data.height, data.width
        if model.reference_grid is None:
            height, width = self.sample_clips(stage)[0].size
        else:
            sides = zip(model.reference_grid, model.patch_shape)
            height, width = (pixels * tokens for tokens, pixels in sides)
        return height * space_factor, width * space_factor

    def export_images(
        self, stage: str, folder: Path, height: int, width: int
    ) -> list[dict[str, str]]:
        """Write images to start from, of the checkpoint's size, and return their entries of
        `config.json`, the sample's first.

        A model of the user's videos has one, the first frame of a clip.
        """
        if self.recipe.data:
            images = next(iter(self.recipe.data.values())).first_images()
        else:
            batch, vae = self.sample_clips(stage)
            with torch.no_grad():
                video = vae.decode(batch.latents[:1, :, :1])
            pixels = to_pixels(video)[0, 0].numpy()
            images = [FirstImage("sample", Image.fromarray(pixels), batch.prompts[0])]
        entries = []
        for first in images:
            name = SAMPLE_IMAGE if not entries else f"{first.name}.png"
            pixels, _ = fit_image(first.image, height, width)
            Image.fromarray(pixels).save(folder / name)
            entries.append({"image": name, "prompt": first.prompt})
        return entries

    def export_vae(self, stage: str, folder: Path) -> dict[str, dict]:
        """Write the autoencoder, and beside a light decoder's also the original one.

        An autoencoder that was given is kept bit for bit. Returns the entries of `config.json`.
        """
        vaes = {LIGHT: self.autoencoder(next(iter(self.recipe.stages[stage].needs)))}
        if self.recipe.autoencoder:
            if ORIGINAL in load_config(find_checkpoint(self.inputs.vae_of(self.recipe))):
                vaes[ORIGINAL] = self.vae("decoder")
        elif self.result(light_decoder.STAGE).is_file():
            vaes[ORIGINAL] = self.vae("decoder")
        dtype = torch.bfloat16 if self.recipe.vae else lossless_dtype(vaes[LIGHT])
        return save_vaes(folder, vaes, dtype)


def run(
    recipe: Recipe,
    out: Path,
    stages: Sequence[str] | None = None,
    *,
    report: Callable[[str], None] = print,
    **arguments,
) -> Path:
    """Run stages of a recipe in the folder `out`, and export the last generator.

    Every rank calls it. Stages with a result are skipped, and so is an export that is newer than
    all results. The same call resumes after an interruption.

    Args:
        stages: Names of stages; None for all of the recipe.
        report: Called with one line per finished stage.
        arguments: Further arguments of `Run`.

    Returns the checkpoint's folder. Raises TrainingError for an update that fails, FolderInUse for
    a folder in which another run trains, ValueError for an unknown stage and for a folder that
    holds another recipe.
    """
    names = stage_names(recipe)
    check_stages(recipe, stages or ())
    run_ = Run(recipe, out, **arguments)
    run_.check(stages or names)
    with locked(out, run_.parallel):
        run_.claim(stages or names)
        for line in run_.cut_captions(stages or names):
            report(line)
        for stage in stages or names:
            if run_.parallel.agree(run_.result(stage).is_file()):
                report(f"{stage}: already done")
                drop_states(run_.out / stage)  # left by a run that ended right after its result
                continue
            start = time.perf_counter()
            run_.run(stage)
            report(f"{stage}: {(time.perf_counter() - start) / 60:.1f} min")
        done = [stage for stage in recipe.stages if run_.result(stage).is_file()]
        if done and run_.parallel.main and not run_.exported(done[-1]):
            run_.export(done[-1])
        run_.parallel.wait()
    return out / recipe.name if done else out
