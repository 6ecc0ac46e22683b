"""Training data from the tiny world: rendered clips, and the latents of many of them."""

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..randomness import ClipRandom
from ..vae import CausalVAE
from .clips import LatentClips
from .world import THEMES, Clip, sample_clip


@dataclass(frozen=True)
class ProceduralData:
    """How much of the world is rendered. Clip i of a set has seed `first_seed + i`."""

    height: int
    width: int
    clips: int
    latent_frames: int
    video_clips: int = 0  # the first of them, kept as pixels for the decoder
    first_seed: int = 1_000


def render_clips(data: ProceduralData, workers: int, count: int | None = None) -> Iterator[Clip]:
    """The first `count` clips in order, all unless given, rendered by `workers` processes."""
    count = data.clips if count is None else count
    seeds = range(data.first_seed, data.first_seed + count)
    render = partial(
        sample_clip,
        latent_frames=data.latent_frames,
        height=data.height,
        width=data.width,
    )
    # Fork would copy torch's threads in an unknown state.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_single_thread) as pool:
        yield from pool.imap(render, seeds, chunksize=4)


def _single_thread() -> None:
    torch.set_num_threads(1)


class VideoClips:
    """Clips as pixels: at most `count`, each uint8 (F, H, W, 3), all of one shape."""

    def __init__(self, videos: Iterable[Tensor], count: int):
        first = next(videos := iter(videos))
        self.videos = first.new_empty(count, *first.shape)  # beside a list, twice the memory
        made = 0
        for made, video in enumerate(chain([first], videos), start=1):
            self.videos[made - 1] = video
        self.videos = self.videos[:made]

    def sample(self, random: ClipRandom, frames: int) -> Tensor:
        """Random windows (B, 3, frames, H, W) in [-1, 1]."""
        count, length = self.videos.shape[:2]
        if frames > length:
            raise ValueError(f"frames: expected at most {length}, got {frames}")
        clips, starts = random.integers(count), random.integers(length - frames + 1)
        windows = [self.videos[c, s : s + frames] for c, s in zip(clips, starts)]
        return to_video(torch.stack(windows).to(random.device))


def to_video(pixels: Tensor) -> Tensor:
    """uint8 (B, F, H, W, 3) as (B, 3, F, H, W) in [-1, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.inference_mode()
def encode_clips(vae: CausalVAE, clips: Iterable[Clip], batch: int = 4) -> dict[str, Tensor]:
    """Latents (clips, C, T, h, w) float16, controls (clips, T - 1, 2) and themes (clips,)."""
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
    """What `encode_clips` returned, or its saved form, with each theme's phrasings."""
    phrasings = [THEMES[theme].prompts for theme in tensors["themes"].tolist()]
    return LatentClips(tensors["latents"], tensors["controls"], phrasings)
