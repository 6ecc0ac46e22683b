"""Starts of an evaluation with their truth, and rollouts from them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..streaming.generator import StreamingGenerator
from ..streaming.rollout import roll_out
from .footage import Footage, film, latent_statistics
from .windows import Window

Timed = Callable[[str], AbstractContextManager]  # a part of the work, by its name
TRUTH, AUTOENCODER = "truth", "autoencoder"  # the sources that are no checkpoints


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
