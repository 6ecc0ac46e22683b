"""Batched rollouts frame after frame, and their decoding."""

from collections.abc import Callable, Container, Iterable, Iterator

import torch
from torch import Tensor

from ..model.config import FewStepConfig, SamplingConfig
from ..model.world_model import WorldModel
from ..vae import CausalVAE
from .diffusion import DiffusionRollout, RecomputedRollout
from .few_step import FewStepRollout
from .noise import Noise
from .student import StudentRollout


@torch.no_grad()
def roll_out(
    model: WorldModel,
    first: Tensor,
    text: tuple[Tensor, Tensor],
    condition: Callable[[int], Tensor | None],
    steps: int,
    seed: int,
    sampling: SamplingConfig | FewStepConfig | None = None,
    caches: bool = True,
) -> Iterator[Tensor]:
    """Yields latent frames 0 to `steps` of a batch of streams, (B, C, 1, H, W) each.

    Args:
        first: Frame 0, (B, C, 1, H, W).
        text: Embeddings (B, text_tokens, text_width) and lengths (B,).
        condition: `condition(n)` returns the channels (B, C', 1, H, W) of frame n, None for none.
        seed: Stream i draws its noise from `seed` and i alone.
        sampling: Sampling of a diffusion or few-step model; None for one pass per frame.
        caches: False makes a diffusion model compute the past in every pass (`RecomputedRollout`).
    """
    if isinstance(sampling, FewStepConfig):
        yield from _roll_out_chunks(model, first, text, condition, steps, seed, sampling)
        return
    noises = [Noise((seed << 20) + i, first[:1].shape, first.device) for i in range(len(first))]
    if sampling is None:
        rollout = StudentRollout(model.transformer, *text, first)
    else:
        unguided = model.text_encoder([""] * len(first))
        kind = DiffusionRollout if caches else RecomputedRollout
        rollout = kind(model.transformer, *text, unguided, first, sampling)
    yield first
    latent = first
    for step in range(1, steps + 1):
        noise = torch.cat([noise(step - 1) for noise in noises])
        latent = rollout.step(noise.to(first), latent, condition(step))
        yield latent


def _roll_out_chunks(
    model: WorldModel,
    first: Tensor,
    text: tuple[Tensor, Tensor],
    condition: Callable[[int], Tensor | None],
    steps: int,
    seed: int,
    sampling: FewStepConfig,
) -> Iterator[Tensor]:
    """Yields the frames of a few-step model as `roll_out` does; frame 0 is its first chunk, or the
    first frame of that. ValueError for a model that takes no picture."""
    config, joined = model.config, sampling.picture_in_chunk
    if not sampling.takes_picture(config):
        raise ValueError(
            "first: expected a model that a picture can start, got one whose first chunk has "
            f"{config.opening_frames} frames"
        )
    if sampling.negatives:
        negatives = model.text_encoder(sampling.negatives * len(first))
        text = tuple(map(torch.cat, zip(text, negatives, strict=True)))
    rollout = FewStepRollout(model.transformer, *text, first.shape[-2:], sampling)
    if not joined:
        driven = first.new_zeros(len(first), config.condition_channels, 1, *first.shape[-2:])
        rollout.give(first, driven if config.condition_channels else None)  # nothing drives it
    yield first
    made, number = 0, 0
    while made < steps:
        picture = first if joined and number == 0 else None
        frames = config.chunk if picture is None else config.opening_frames
        draws = sampling.draws(opening=number == 0)
        shape = (draws, 1, first.shape[1], frames, *first.shape[-2:])
        streams = range(seed << 20, (seed << 20) + len(first))
        noise = torch.cat([Noise(i, shape, first.device)(number) for i in streams], dim=1)
        latents = rollout.step(noise.to(first), condition(made + 1), picture).split(1, dim=2)
        new = latents[0 if picture is None else 1 :][: steps - made]
        yield from new
        made, number = made + len(new), number + 1


def starting_over(channels: Tensor | None) -> Callable[[int], Tensor | None]:
    """Returns the `condition` of `roll_out` for a clip with channels (B, C', T, H, W) of frames 1
    to T. After the end of the clip its motion is repeated."""

    def condition(step: int) -> Tensor | None:
        if channels is None:
            return None
        place = (step - 1) % channels.shape[2]
        return channels[:, :, place : place + 1]

    return condition


@torch.no_grad()
def decode_frames(
    vae: CausalVAE, latents: Iterable[Tensor], wanted: Container[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of each wanted latent frame, counted from 0, and its video, uint8 (B, F, H,
    W, 3). latents: the frames (B, C, 1, h, w) of a stream; frames that are not wanted cost
    little."""
    state, pending = None, []
    for number, latent in enumerate(latents):
        pending.append(latent.to(vae.latent_mean.dtype))
        if number == 0:
            video, state = vae.decode_frame(pending.pop(), pixels=True)
        elif number in wanted:
            chunk = torch.cat(pending, dim=2)
            video, state = vae.decode_frame(chunk, state, pixels=True, last=1)
            pending.clear()
        if number in wanted:
            yield number, video.permute(0, 2, 3, 4, 1).cpu()
