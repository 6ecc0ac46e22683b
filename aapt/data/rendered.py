"""Sets of clips that a run renders itself, and the processes that render them."""

import multiprocessing
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from typing import ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..vae import CausalVAE
from ..vae.pixels import to_video
from .clips import LatentClips

CHUNK = 4  # clips that a process renders before it is asked again


class RenderedClip(Protocol):
    """A rendered clip of n latent frames; each kind of set adds its motion.

    Attributes:
        video: uint8 (4 n - 3, height, width, 3).
        prompt: A sentence that describes it.
    """

    video: Tensor
    prompt: str


@dataclass(frozen=True)
class FirstImage:
    """An image to start from, of any size, with the name of its file and its prompt."""

    name: str
    image: Image.Image
    prompt: str


@dataclass(frozen=True)
class RenderedData(ABC):
    """A set of clips to render. Clip i has seed `first_seed + i`.

    Attributes:
        height, width: Size of the video in pixels.
        clips: Number of clips.
        latent_frames: Latent frames of a clip, with the first frame.
        video_clips: Number of clips, from the first one, that are also kept as pixels to train the
            decoder on.
        first_seed: Seed of clip 0.
        poses: True if drawn skeletons are the clips' motion, see `aapt.model.pose`.
    """

    height: int
    width: int
    clips: int
    latent_frames: int
    video_clips: int = 0
    first_seed: int = 1_000
    poses: ClassVar[bool] = False

    @property
    @abstractmethod
    def prompts(self) -> list[str]:
        """A prompt for every look of the videos."""

    @abstractmethod
    def clip(self, seed: int) -> RenderedClip:
        """Render the clip of a seed. Equal seeds give equal clips."""

    @abstractmethod
    def encode(self, vae: CausalVAE, clips: Iterable[RenderedClip]) -> dict[str, Tensor]:
        """Encode clips into latents (clips, C, T, h, w) float16, and gather their motion."""

    @abstractmethod
    def latent_clips(self, tensors: dict[str, Tensor]) -> LatentClips:
        """Open the result of `encode`."""

    @abstractmethod
    def first_images(self) -> list[FirstImage]:
        """Images to start from: a checkpoint's sample, then its gallery."""


def render_clips(
    data: RenderedData, workers: int, count: int | None = None
) -> Iterator[RenderedClip]:
    """Render the first `count` clips in order, by default all, with `workers` processes; a few in
    this one, because a process takes seconds to start."""
    count = data.clips if count is None else count
    seeds = range(data.first_seed, data.first_seed + count)
    if count <= CHUNK:
        yield from map(data.clip, seeds)
        return
    # Fork would copy the locks of torch's threads in an unknown state.
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as ended:
        with _interrupts_delayed():
            pool = ended.enter_context(spawn.Pool(workers, initializer=_single_thread))
        yield from pool.imap(data.clip, seeds, chunksize=CHUNK)


@torch.inference_mode()
def encoded(
    vae: CausalVAE, clips: Iterable[RenderedClip], batch: int = 4
) -> Iterator[tuple[Sequence[RenderedClip], Tensor]]:
    """Encode the videos of clips, `batch` per pass. Yields the clips of a pass and their latents
    (clips, C, T, h, w) float16."""
    clips = iter(clips)
    while pending := list(islice(clips, batch)):
        yield pending, vae.encode(to_video(torch.stack([clip.video for clip in pending]))).half()


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
