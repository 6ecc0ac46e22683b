"""Training data from the tiny world: rendered clips, and the latents of many of them.

Run `python -m aapt.data.tiny_world.rendered_clips --out sheet.png` to draw every theme.
"""

import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...vae import CausalVAE
from ...vae.pixels import to_video
from ..clips import LatentClips
from .render import render
from .themes import THEMES
from .world import make_world, sample_trajectory


@dataclass(frozen=True)
class Clip:
    """A rendered clip of n latent frames, with its controls, poses and prompt.

    Attributes:
        video: uint8 (4 n - 3, height, width, 3).
        controls: float32 (n - 1, 2), rows (yaw, forward); row i drives video frames 4 i + 1 to
            4 i + 4.
        poses: float64 (4 n - 3, 3), rows (x, y, heading).
        prompt: A sentence of the theme.
        theme: Index into THEMES.
    """

    video: Tensor
    controls: Tensor
    poses: Tensor
    prompt: str
    theme: int


def sample_clip(
    seed: int,
    latent_frames: int,
    *,
    theme: int | None = None,
    height: int = 80,
    width: int = 128,
) -> Clip:
    """Render a random walk through a random world. Equal arguments give equal clips.

    Args:
        seed: Any int >= 0; decides world, walk and prompt, and the theme unless it is given.
        latent_frames: Length, with the first frame; 1 gives a single image.
        theme: Index into THEMES, None for a random one.
        height, width: Size of the video in pixels.
    """
    if latent_frames < 1:
        raise ValueError(f"latent_frames: expected 1 or more, got {latent_frames}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(THEMES)))
    theme = drawn if theme is None else theme
    world = make_world(seed, theme)
    prompt = THEMES[theme].prompts[int(rng.integers(len(THEMES[theme].prompts)))]
    controls, poses = sample_trajectory(world, latent_frames - 1, rng)
    return Clip(render(world, poses, height, width), controls, poses, prompt, theme)


@dataclass(frozen=True)
class ProceduralData:
    """A set of clips to render. Clip i has seed `first_seed + i`.

    Attributes:
        height, width: Size of the video in pixels.
        clips: Number of clips.
        latent_frames: Latent frames of a clip, with the first frame.
        video_clips: Number of clips, from the first one, that are also kept as pixels to train the
            decoder on.
        first_seed: Seed of clip 0.
    """

    height: int
    width: int
    clips: int
    latent_frames: int
    video_clips: int = 0
    first_seed: int = 1_000


def render_clips(data: ProceduralData, workers: int, count: int | None = None) -> Iterator[Clip]:
    """Render the first `count` clips in order, by default all, with `workers` processes."""
    count = data.clips if count is None else count
    seeds = range(data.first_seed, data.first_seed + count)
    render_clip = partial(
        sample_clip,
        latent_frames=data.latent_frames,
        height=data.height,
        width=data.width,
    )
    # Fork would copy the locks of torch's threads in an unknown state.
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as ended:
        with _interrupts_delayed():
            pool = ended.enter_context(spawn.Pool(workers, initializer=_single_thread))
        yield from pool.imap(render_clip, seeds, chunksize=4)


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C until the end. Processes that start in the meantime never receive it.

    A worker whose start is interrupted, here or in itself, would print a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread alone
        return
    seen: list[int] = []
    resource_tracker.ensure_running()  # its start would lift the block
    handler = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if seen:
            signal.raise_signal(signal.SIGINT)


def _single_thread() -> None:
    torch.set_num_threads(1)


@torch.inference_mode()
def encode_clips(vae: CausalVAE, clips: Iterable[Clip], batch: int = 4) -> dict[str, Tensor]:
    """Encode clips into latents (clips, C, T, h, w) float16, `batch` clips per pass.

    The result also has controls (clips, T - 1, 2) and themes (clips,).
    """
    latents, controls, themes, pending = [], [], [], []

    def flush():
        if pending:
            latents.append(vae.encode(to_video(torch.stack(pending))).half())
            pending.clear()

    for clip in clips:
        pending.append(clip.video)
        controls.append(clip.controls)
        themes.append(clip.theme)
        if len(pending) == batch:
            flush()
    flush()
    return {
        "latents": torch.cat(latents),
        "controls": torch.stack(controls).float(),
        "themes": torch.tensor(themes),
    }


def latent_clips(tensors: dict[str, Tensor]) -> LatentClips:
    """A set of the result of `encode_clips`, with the prompts of each clip's theme."""
    phrasings = [THEMES[theme].prompts for theme in tensors["themes"].tolist()]
    return LatentClips(tensors["latents"], tensors["controls"], phrasings)


def draw_themes(path: str | Path, moments: int = 6) -> None:
    """Write an image with a row per theme: moments of one walk, 6 latent frames apart."""
    from PIL import Image

    rows = []
    for theme in range(len(THEMES)):
        clip = sample_clip(theme, 6 * moments, theme=theme)
        rows.append(np.concatenate(list(clip.video[::24].numpy()), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draws a contact sheet of the tiny world.")
    parser.add_argument("--out", default="sheet.png")
    draw_themes(parser.parse_args().out)
