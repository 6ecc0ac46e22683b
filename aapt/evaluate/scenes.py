"""The starts of an evaluation with their truth, and rollouts from them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model.caches import loss_is_said
from ..streaming.generator import StreamingGenerator
from ..streaming.rollout import roll_out
from .video_frames import VideoFrames, decode_chosen, latent_statistics
from .windows import Window

Timed = Callable[[str], AbstractContextManager]  # times a part of the work, by its name
TRUTH, AUTOENCODER = "truth", "autoencoder"  # the sources of video that are no checkpoints


class Scenes(Protocol):
    """Starts of an evaluation, what drives the camera from there, and the truth.

    Attributes:
        prompts: One per start.
        labels: The starts' names on the contact sheet.
        steps: Latent frames of the truth after the first. Rollouts may be longer.
    """

    prompts: Sequence[str]
    labels: Sequence[str]
    steps: int

    def truth(
        self,
        generator: StreamingGenerator,
        frames: Sequence[int],
        windows: Sequence[Window],
        timed: Timed,
    ) -> tuple[dict[str, VideoFrames], list[Tensor]]:
        """Make the truth's video frames with these numbers, up to its end.

        Returns the video frames by source: TRUTH and, if the truth was not decoded itself,
        AUTOENCODER, which is the truth encoded and decoded by the generator's autoencoder; and the
        `latent_statistics` (starts, T, 2) of the truth in each window that it covers.
        """

    def truth_video(
        self, generator: StreamingGenerator, start: int, steps: int
    ) -> Iterator[Tensor]:
        """Yield the truth of one start, video frames uint8 (F, H, W, 3), up to its end or to the
        latent frame `steps`."""

    def first_latents(self, generator: StreamingGenerator) -> Tensor:
        """Return the first frames of rollouts: latents (starts, C, 1, h, w), on the generator's
        device and in its precision."""

    def condition(self, generator: StreamingGenerator) -> Callable[[int], Tensor | None]:
        """Return the function from a step to its condition channels, see `roll_out`."""

    def control_metrics(self, video: Tensor, palettes: Tensor, window: Window) -> Mapping[str, Any]:
        """Measure how a video keeps to its theme and controls in one window.

        video: uint8 (starts, 1 + 4 T, H, W, 3), with `palettes` (starts, 6). Returns fields of a
        `Measurement`; none if these scenes know neither.
        """

    def cameras(self, window: Window) -> Tensor | None:
        """Return the cameras (starts, 1 + 4 T, 4, 4) that the motion of a window asks for, relative
        to that of the frame before the window; None if the starts have no camera motion."""

    def object_fields(
        self, generator: StreamingGenerator, videos: Mapping[str, VideoFrames], timed: Timed
    ) -> Mapping[str, Any]:
        """Measure which objects of the truth every source of videos still shows.

        Returns fields of a `Report`; none if these scenes know no objects.
        """

    def report_fields(self, truth: VideoFrames, window: Window) -> Mapping[str, Any]:
        """Return the fields of a `Report` about the truth; `window` is the last."""


@torch.inference_mode()
def roll_out_scenes(
    generator: StreamingGenerator,
    scenes: Scenes,
    steps: int,
    frames: Iterable[int],
    seed: int,
    kept: int = 0,
) -> tuple[VideoFrames, Tensor, Tensor]:
    """Generate `steps` latent frames from all starts together, on the streaming path.

    Noise is drawn per start. Returns the video frames with the numbers `frames`, the
    `latent_statistics` (starts, 1 + steps, 2) of all latent frames, and the latents of the first
    `kept` starts (kept, C, 1 + steps, h, w), all on the CPU.
    """
    model, statistics, latents = generator.model, [], []
    first, channels = scenes.first_latents(generator), scenes.condition(generator)

    def condition(step: int) -> Tensor | None:
        given = channels(step)
        return None if given is None else given.to(first)

    def measured() -> Iterator[Tensor]:
        text = model.text_encoder(scenes.prompts)
        for latent in roll_out(model, first, text, condition, steps, seed, generator.sampling):
            statistics.append(latent_statistics(latent))
            latents.append(latent[:kept].cpu())
            yield latent

    with loss_is_said():
        video = decode_chosen(generator.vae, measured(), frames)
    return video, torch.cat(statistics, dim=1).cpu(), torch.cat(latents, dim=2)
