"""Makes a light decoder for an autoencoder that there is: the recipes `vae-light` and `wan-light`.

run(vae_light(), Path("runs/vae-light"))                            # for the bundled world
run(wan_light(), out, vae="Wan2.1/vae", videos=Path("videos/"))  # for one's own
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..checkpoint import file_digest, load_module, save_module
from ..clock import FRAMES_PER_LATENT
from ..data.clips import VideoClips
from ..data.tiny_world.rendered_clips import render_clips
from ..data.videos.buckets import Bucket
from ..data.videos.pixel_clips import source_digest, video_clips
from ..media.contact_sheet import SHOWN_ROWS, contact_sheet
from ..training.perceptual import PerceptualDistance
from ..training.recipes import LightRecipe
from ..training.stages.light_decoder import LightDecoderConfig, LightDecoderTraining, light_behind
from ..vae import CausalVAE, lighter
from ..vae.folder import ORIGINAL, load_vae, vae_digest, with_light_decoder
from ..vae.pixels import to_pixels, to_video
from .loop import Habits, claim, drop_states, train
from .parallel import Parallel

STAGE = "light-decoder"
SAMPLES = 3  # clips of a sheet
SHOWN_FRAMES = 6  # and frames of each


def run(
    recipe: LightRecipe,
    out: Path,
    *,
    vae: str | Path | None = None,
    videos: Path | None = None,
    perceptual: Path | None = None,
    workers: int = 2,
    parallel: Parallel | None = None,
    habits: Habits | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a light decoder for an autoencoder and export what that belongs to, with it.

    Args:
        vae: Where the autoencoder is: a bundled model, a checkpoint folder, or one of diffusers'
            Wan; None for the recipe's.
        videos: What the decoder learns from; None for clips of the procedural world, where the
            recipe is for that.
        perceptual: The file of a `PerceptualDistance`.
        workers: Processes that render clips.

    Returns the new checkpoint's folder. The same call goes on after an interruption, wherever the
    same inputs lie by then: `recipe.json` keeps digests of them. Raises
    CheckpointError for an autoencoder that cannot be used, ValueError for other bad input and for a
    folder that holds other results, TrainingError where a metric or a gradient is not finite.
    """
    parallel, habits = parallel or Parallel.single(), habits or Habits()
    if parallel.world > 1:
        raise ValueError(f"{recipe.name}: expected one rank, got {parallel.world}")
    source = vae or recipe.vae
    if source is None:
        raise ValueError("vae: expected the original autoencoder's folder, got none")
    if recipe.vae is None and videos is None:
        raise ValueError("videos: expected a folder of videos, got none")
    torch.manual_seed(recipe.seed)
    original = load_vae(source, ORIGINAL)
    light = new_light(recipe.decoder, original)
    distance = PerceptualDistance(perceptual) if perceptual else None
    of = {
        "original": vae_digest(original),
        "videos": videos and source_digest(videos),
        "perceptual": perceptual and file_digest(perceptual),
    }
    if said := claim(out, asdict(recipe) | of):
        raise ValueError(f"{said}; train another recipe in another folder")

    result = out / STAGE / "weights.safetensors"
    if result.is_file():
        load_module(result, light)
        drop_states(result.parent)
        report(f"{STAGE}: already done")
    else:
        start = time.perf_counter()
        data = _clips(recipe, videos, workers, report)
        stage = LightDecoderTraining(
            recipe.decoder,
            original.to(parallel.device),
            light.to(parallel.device),
            distance and distance.to(parallel.device),
        )
        light = train_light(stage, data, out / STAGE, recipe.seed, parallel, habits)
        report(f"{STAGE}: {(time.perf_counter() - start) / 60:.1f} min")
    return with_light_decoder(source, light, original, out / recipe.name)


def new_light(config: LightDecoderConfig, original: CausalVAE) -> CausalVAE:
    return light_behind(original, config.shape or lighter(original.config))


def train_light(
    stage: LightDecoderTraining,
    data: VideoClips,
    folder: Path,
    seed: int,
    parallel: Parallel,
    habits: Habits,
) -> CausalVAE:
    """All updates of the stage, and its result in `folder`."""
    sets = {stage.config.clips: data}
    given = {"seed": seed, "parallel": parallel, "habits": habits}
    made = train(stage, sets, folder, **given, sample=_sampler(stage, data, folder))
    save_module(folder / "weights.safetensors", made)
    drop_states(folder)
    return made


def _sampler(stage: LightDecoderTraining, data: VideoClips, folder: Path) -> Callable[[int], None]:
    """Draws `samples-<updates>.png`: the truth, the original decoder and the light one."""
    pixels = data.videos[:SAMPLES, : stage.config.video_frames]
    step = max(1, pixels.shape[1] // SHOWN_FRAMES)
    columns = [f"frame {frame}" for frame in range(0, pixels.shape[1], step)]
    scale = max(1, SHOWN_ROWS // pixels.shape[2])

    @torch.no_grad()
    def sample(done: int) -> None:
        latent = stage.original.encode(to_video(pixels.to(stage.original.latent_mean.device)))
        rows = {"truth": pixels}
        for name, vae in (("original", stage.original), ("light", stage.light)):
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
    data = recipe.data
    if videos is None:
        rendered = render_clips(data, workers, data.video_clips)
        return VideoClips((clip.video for clip in rendered), data.video_clips)
    frames = 1 + FRAMES_PER_LATENT * (data.latent_frames - 1)
    size = Bucket(data.width, data.height)
    count = data.video_clips
    clips = VideoClips(video_clips(videos, size, frames, count, report=report), count)
    report(f"{videos}: {len(clips.videos)} clips of {frames} frames, {size}")
    return clips
