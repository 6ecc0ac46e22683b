"""Trains an autoencoder with a linear encoder from rendered clips: the recipe `vae-fine`."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..checkpoint import load_module, save_config, save_module
from ..clock import FPS
from ..data.clips import VideoClips
from ..data.rendered import render_clips
from ..training.recipe import VAERecipe
from ..training.stages.decoder import fit_linear
from ..vae import CausalVAE
from ..vae.folder import LIGHT, save_vaes
from .light_decoder import STAGE, train_light
from .loop import RunOptions, claim, drop_states, locked
from .parallel import Parallel

ENCODER = "encoder"
FIT_CLIPS = 60  # enough for a linear map


def run(
    recipe: VAERecipe,
    out: Path,
    *,
    workers: int = 2,
    parallel: Parallel | None = None,
    options: RunOptions | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Fit the encoder in closed form, train the decoder, and export both as a checkpoint.

    The same call resumes after an interruption.

    Args:
        workers: Processes that render clips.
        report: Called with one line per finished part.

    Returns the checkpoint's folder, which `aapt.vae.folder.load_vae` reads. Raises FolderInUse for
    a folder in which another run trains, ValueError for several ranks and for a folder that holds
    other results, TrainingError for an update that fails.
    """
    parallel, options = parallel or Parallel.single(), options or RunOptions()
    if parallel.world > 1:
        raise ValueError(f"{recipe.name}: expected one rank, got {parallel.world}")
    torch.manual_seed(recipe.seed)
    encoder, made = (out / part / "weights.safetensors" for part in (ENCODER, STAGE))
    with locked(out, parallel):
        if difference := claim(out, asdict(recipe)):
            raise ValueError(f"{difference}; train another recipe in another folder")
        if made.is_file():
            vae = CausalVAE(recipe.vae)
            load_module(made, vae)
            drop_states(made.parent)
            report(f"{ENCODER}, {STAGE}: already done")
        else:
            start = time.perf_counter()
            count = recipe.data.video_clips
            rendered = render_clips(recipe.data, workers, count)
            clips = VideoClips((clip.video for clip in rendered), count)
            vae = fitted(recipe, clips, encoder).to(parallel.device)
            given = clips, made.parent, recipe.seed, parallel, options
            vae = train_light(recipe.decoder, (vae, vae), *given)
            report(f"{ENCODER}, {STAGE}: {(time.perf_counter() - start) / 60:.1f} min")
        folder = out / recipe.name
        size = {"height": recipe.data.height, "width": recipe.data.width, "fps": FPS}
        vaes = save_vaes(folder, {LIGHT: vae}, torch.bfloat16)
        save_config(folder, {"name": recipe.name, **size, **vaes})
    return folder


def fitted(recipe: VAERecipe, clips: VideoClips, result: Path) -> CausalVAE:
    """Load the autoencoder with a fitted encoder from `result`, or fit it and save it there."""
    if result.is_file():
        vae = CausalVAE(recipe.vae)
        load_module(result, vae)
        return vae
    vae = fit_linear(recipe.vae, clips.videos[:FIT_CLIPS])
    save_module(result, vae)
    return vae
