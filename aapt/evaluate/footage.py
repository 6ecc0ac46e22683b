"""The video frames that an evaluation keeps of many videos, and those that a checkpoint makes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.world import FRAMES_PER_LATENT
from ..generator import StreamingGenerator
from ..optimization import mixed_precision
from ..samples import decode_frames, roll_out
from ..vae import CausalVAE
from .moments import Window

Timed = Callable[[str], AbstractContextManager]  # a part of the work, by its name


@dataclass(frozen=True)
class Footage:
    """Some video frames of several videos: pixels uint8 (starts, len(frames), H, W, 3), where
    `frames` are their numbers in the whole videos."""

    frames: Sequence[int]
    pixels: Tensor

    def __getitem__(self, frames: Sequence[int]) -> Tensor:
        """The frames of these numbers: uint8 (starts, len(frames), H, W, 3)."""
        places = {frame: place for place, frame in enumerate(self.frames)}
        missing = [frame for frame in frames if frame not in places]
        if missing:
            raise ValueError(f"frames: expected numbers that were kept, got {missing}")
        return self.pixels[:, [places[frame] for frame in frames]]


class Scenes(Protocol):
    """Where the starts of an evaluation come from, and the truth about them.

    Attributes:
        prompts, labels: Of each start; labels are what the sheet calls them.
        steps: Latent frames after the first that the truth goes on for. Rollouts may be longer.
    """

    prompts: Sequence[str]
    labels: Sequence[str]
    steps: int

    def film(
        self,
        generator: StreamingGenerator,
        frames: Sequence[int],
        windows: Sequence[Window],
        timed: Timed,
    ) -> tuple[dict[str, Footage], list[Tensor]]:
        """The truth, as far as there is one, and where that means something the truth through
        `generator`'s autoencoder and back; and the `latent_statistics` (starts, T, 2) of the truth
        in each of `windows`, which it covers."""

    def first(self, generator: StreamingGenerator) -> Tensor:
        """What rollouts begin with: latents (starts, C, 1, h, w) on the generator's device."""

    def condition(self, generator: StreamingGenerator) -> Callable[[int], Tensor | None]:
        """What drives them, see `roll_out`."""

    def obedience(self, video: Tensor, palettes: Tensor, window: Window) -> Mapping[str, Any]:
        """Fields of a `Measurement` that only these starts can tell, of one window of a video,
        uint8 (starts, 1 + 4 T, H, W, 3), whose palettes are (starts, 6)."""

    def facts(self, truth: Footage, window: Window) -> Mapping[str, Any]:
        """What these starts add to a `Report`; `window` is the last."""


def precision(device: torch.device) -> AbstractContextManager:
    """What checkpoints make videos in: as training's samples on a GPU, float32 on a CPU."""
    return mixed_precision(device) if device.type == "cuda" else nullcontext()


@torch.inference_mode()
def film(vae: CausalVAE, latents: Iterable[Tensor], frames: Iterable[int]) -> Footage:
    """Some video frames of streams of latent frames (starts, C, 1, h, w)."""
    wanted = set(frames)
    pixels, chosen = [], {math.ceil(frame / FRAMES_PER_LATENT) for frame in wanted}
    with precision(vae.latent_mean.device):
        for number, video in decode_frames(vae, latents, chosen):
            begin = FRAMES_PER_LATENT * number - video.shape[1] + 1
            pixels.append(video[:, [i for i in range(video.shape[1]) if begin + i in wanted]])
    return Footage(sorted(wanted), torch.cat(pixels, dim=1))


@torch.inference_mode()
def film_rollout(
    generator: StreamingGenerator, scenes: Scenes, steps: int, frames: Iterable[int], seed: int
) -> tuple[Footage, Tensor]:
    """All starts generated side by side on the streaming path, `steps` latent frames.

    Noise is drawn per start. Returns the footage and the `latent_statistics` (starts, 1 + steps, 2)
    of all latent frames.
    """
    model, statistics = generator.model, []
    first, condition = scenes.first(generator), scenes.condition(generator)

    def measured() -> Iterator[Tensor]:
        text = model.text_encoder(scenes.prompts)
        for latent in roll_out(model, first, text, condition, steps, seed, generator.sampling):
            statistics.append(latent_statistics(latent))
            yield latent

    footage = film(generator.vae, measured(), frames)
    return footage, torch.cat(statistics, dim=1).cpu()


def latent_statistics(latents: Tensor) -> Tensor:
    """Offset and deviation (B, T, 2) of each latent frame of (B, C, T, h, w): the root mean square
    of its channels' means, and the standard deviation of all its numbers."""
    frames = latents.float().transpose(1, 2)  # (B, T, C, h, w)
    offset = frames.mean(dim=(3, 4)).square().mean(dim=2).sqrt()
    return torch.stack([offset, frames.flatten(2).std(dim=-1)], dim=-1)
