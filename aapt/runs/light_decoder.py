"""Trains a light decoder for an existing autoencoder: the recipes `vae-light` and `wan-light`.

run(vae_light(), Path("runs/vae-light"))                         # for the bundled world
run(wan_light(), out, vae="Wan2.1/vae", videos=Path("videos/"))  # for an autoencoder of your own
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import file_digest, load_module, save_module
from ..clock import FRAMES_PER_LATENT
from ..data.clips import VideoClips
from ..data.rendered import render_clips
from ..data.videos.buckets import Bucket
from ..media.contact_sheet import SHOWN_ROWS, contact_sheet
from ..training.losses import sharpened
from ..training.perceptual import PerceptualDistance
from ..training.recipe import LightRecipe
from ..training.stages.light_decoder import LightDecoderConfig, LightDecoderTraining, light_vae_for
from ..vae import CausalVAE, lighter
from ..vae.folder import ORIGINAL, load_vae, vae_digest, with_light_decoder
from ..vae.pixels import to_pixels, to_video
from .inputs import claim_clips
from .loop import RunOptions, claim, drop_states, locked, train
from .parallel import Parallel

STAGE = "light-decoder"
FIT_CLIPS = 100  # enough for a lapped linear map
SAMPLES = 3  # clips of a sheet
SHOWN_FRAMES = 6  # video frames of each clip


def run(
    recipe: LightRecipe,
    out: Path,
    *,
    vae: str | Path | None = None,
    videos: Path | None = None,
    perceptual: Path | None = None,
    workers: int = 2,
    parallel: Parallel | None = None,
    options: RunOptions | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a light decoder for an autoencoder, and export the autoencoder's checkpoint with it.

    The same call resumes after an interruption. `recipe.json` and `inputs.json` hold digests of the
    inputs, which may move in the meantime and must not change.

    Args:
        vae: The autoencoder: a bundled model, a checkpoint folder, or a folder of diffusers' Wan;
            None for the recipe's.
        videos: Videos that the decoder learns from; None for clips of the procedural world, if the
            recipe has any.
        perceptual: The file of a `PerceptualDistance`; None for a loss without it.
        workers: Processes that render clips.
        report: Called with one line per finished part.

    Returns the new checkpoint's folder. Raises CheckpointError for an autoencoder that cannot be
    used, FolderInUse for a folder in which another run trains, ValueError for other bad input and
    for a folder that holds other results, TrainingError for an update that fails.
    """
    from ..data.videos.pixel_clips import source_digest  # PyAV, which a machine may lack

    parallel, options = parallel or Parallel.single(), options or RunOptions()
    if parallel.world > 1:
        raise ValueError(f"{recipe.name}: expected one rank, got {parallel.world}")
    source = vae or recipe.vae
    if source is None:
        raise ValueError("vae: expected the original autoencoder's folder, got none; pass --vae")
    if recipe.vae is None and videos is None:
        raise ValueError("videos: expected a folder of videos, got none; pass --videos FOLDER")
    torch.manual_seed(recipe.seed)
    original = load_vae(source, ORIGINAL)
    light = new_light(recipe.decoder, original)
    distance = PerceptualDistance(perceptual) if perceptual else None
    digests = {
        "original": vae_digest(original),
        "videos": videos and source_digest(videos),
        "perceptual": perceptual and file_digest(perceptual),
    }
    with locked(out, parallel):
        if difference := claim(out, asdict(recipe) | digests):
            raise ValueError(f"{difference}; train another recipe in another folder")
        result = out / STAGE / "weights.safetensors"
        if result.is_file():
            load_module(result, light)
            drop_states(result.parent)
            report(f"{STAGE}: already done")
        else:
            start = time.perf_counter()
            data = _clips(recipe, videos, workers, report)
            # Names and sizes of videos are in recipe.json; a video may change and keep both.
            pixels = hashlib.sha256(data.videos.numpy()).hexdigest()
            if videos and (difference := claim_clips(out, pixels)):
                raise ValueError(f"{difference}; train with changed videos in another folder")
            networks = (
                original.to(parallel.device),
                light.to(parallel.device),
                distance and distance.to(parallel.device),
            )
            folder = out / STAGE
            light = train_light(
                recipe.decoder, networks, data, folder, recipe.seed, parallel, options
            )
            report(f"{STAGE}: {(time.perf_counter() - start) / 60:.1f} min")
        return with_light_decoder(source, light, original, out / recipe.name)


def new_light(config: LightDecoderConfig, original: CausalVAE) -> CausalVAE:
    """Make an untrained autoencoder with a light decoder, of the configured shape."""
    return light_vae_for(original, config.shape or lighter(original.config))


def train_light(
    config: LightDecoderConfig,
    networks: Sequence[nn.Module | None],
    data: VideoClips,
    folder: Path,
    seed: int,
    parallel: Parallel,
    options: RunOptions,
) -> CausalVAE:
    """Make all updates of the stage and save its result in `folder`.

    networks: those of `LightDecoderTraining`, which may share one autoencoder. A lapped decoder
    starts from its map in closed form.
    """
    _, light, *_ = networks
    if light.decoder.lapped is not None:
        device = light.latent_mean.device
        clips = (to_video(clip[None].to(device)) for clip in data.videos[:FIT_CLIPS])
        light.fit_lapped(clips, config.fit_noise, partial(sharpened, amount=config.sharpening))
    stage = LightDecoderTraining(config, *networks)
    sets = {stage.config.clips: data}
    given = {"seed": seed, "parallel": parallel, "options": options}
    train(stage, sets, folder, **given, sample=_sampler(stage, data, folder))
    made = stage.export()
    save_module(folder / "weights.safetensors", made)
    drop_states(folder)
    return made


def _sampler(stage: LightDecoderTraining, data: VideoClips, folder: Path) -> Callable[[int], None]:
    """A function that draws `samples-<updates>.png`.

    The sheet shows clips, and their latents decoded by the original decoder and the light one, if
    they are two.
    """
    pixels = data.videos[:SAMPLES, : stage.config.video_frames]
    step = max(1, pixels.shape[1] // SHOWN_FRAMES)
    columns = [f"frame {frame}" for frame in range(0, pixels.shape[1], step)]
    scale = max(1, SHOWN_ROWS // pixels.shape[2])

    @torch.no_grad()
    def sample(done: int) -> None:
        latent = stage.original.encode(to_video(pixels.to(stage.original.latent_mean.device)))
        rows, vaes = {"truth": pixels}, {"original": stage.original, "light": stage.light}
        if stage.original is stage.light:
            vaes = {"decoded": stage.light}
        for name, vae in vaes.items():
            rows[name] = to_pixels(vae.decode(latent))
        groups = [
            [(f"{i} {name}", row[i, ::step]) for name, row in rows.items()]
            for i in range(len(pixels))
        ]
        contact_sheet(groups, columns, scale).save(folder / f"samples-{done}.png")

    return sample


def _clips(
    recipe: LightRecipe, videos: Path | None, workers: int, report: Callable[[str], None]
) -> VideoClips:
    """Render the recipe's clips, or cut clips of the same size and number from videos."""
    data = recipe.data
    if videos is None:
        rendered = render_clips(data, workers, data.video_clips)
        return VideoClips((clip.video for clip in rendered), data.video_clips)
    from ..data.videos.pixel_clips import video_clips

    frames = 1 + FRAMES_PER_LATENT * (data.latent_frames - 1)
    size = Bucket(data.width, data.height)
    count = data.video_clips
    clips = VideoClips(video_clips(videos, size, frames, count, report=report), count)
    report(f"{videos}: {len(clips.videos)} clips of {frames} frames, {size}")
    return clips
