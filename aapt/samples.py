"""Videos from a generator while it is trained: batched rollouts, and a sheet of them."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from .config import SamplingConfig
from .contact_sheet import contact_sheet
from .data.clips import ClipBatch
from .diffusion_rollout import DiffusionRollout, RecomputedRollout
from .student_forcing import StudentRollout
from .vae import CausalVAE, to_bytes
from .world_model import WorldModel

SHOWN_ROWS = 160  # smaller frames are enlarged


@torch.no_grad()
def roll_out(
    model: WorldModel,
    first: Tensor,
    text: tuple[Tensor, Tensor],
    condition: Callable[[int], Tensor | None],
    steps: int,
    seed: int,
    sampling: SamplingConfig | None = None,
    caches: bool = True,
) -> Iterator[Tensor]:
    """Latent frames 0 to `steps` of a batch of streams, (B, C, 1, H, W) each.

    first (B, C, 1, H, W) is frame 0; text (B, text_tokens, text_width) and its lengths (B,);
    `condition(n)`: the channels (B, C', 1, H, W) of frame n, None for none. Stream i draws its
    noise from `seed` and i alone. `sampling`: of a diffusion model, None for one pass per frame;
    without `caches` it computes the past again and again (`RecomputedRollout`).
    """
    randoms = [torch.Generator().manual_seed((seed << 20) + i) for i in range(len(first))]
    if sampling is None:
        rollout = StudentRollout(model.transformer, *text, first)
    else:
        unguided = model.text_encoder([""] * len(first))
        kind = DiffusionRollout if caches else RecomputedRollout
        rollout = kind(model.transformer, *text, unguided, first, sampling)
    yield first
    latent = first
    for step in range(1, steps + 1):
        noise = torch.cat([torch.randn(first[:1].shape, generator=random) for random in randoms])
        latent = rollout.step(noise.to(first), latent, condition(step))
        yield latent


def starting_over(channels: Tensor | None) -> Callable[[int], Tensor | None]:
    """The `condition` of `roll_out` from those of a clip, (B, C', T, H, W) for its frames 1 to T:
    past the clip's end its motion starts over."""

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
    """Numbers of the wanted latent frames (B, C, 1, h, w) of a stream, counted from 0, each with
    its video: uint8 (B, F, H, W, 3). Those between them cost little."""
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


@torch.no_grad()
def sample_sheet(
    model: WorldModel,
    vae: CausalVAE,
    batch: ClipBatch,
    frames: Sequence[int],
    *,
    seed: int = 0,
    fps: int = 24,
    sampling: SamplingConfig | None = None,
) -> Image.Image:
    """What the generator makes of the starts of a batch, under the truth: two rows per clip, one
    column for each of the latent `frames`, counted from the start.

    A rollout may be longer than its clip: its motion then starts over, and the truth is blank.
    The same batch and seed give the same noise, so that sheets of a training can be compared.
    `sampling`: of a diffusion model; without caches, which a training has no memory for, so that
    the work grows with the square of the last frame.
    """
    wanted = sorted(set(frames))
    if not wanted or wanted[0] < 0:
        raise ValueError(f"frames: expected latent frames from 0 on, got {list(frames)}")
    latents, length = batch.latents, batch.latents.shape[2]
    channels, *text = model.conditions(batch.motion, batch.prompts, latents.shape[-2:])
    condition = starting_over(channels)
    first, steps = latents[:, :, :1], wanted[-1]
    made = roll_out(model, first, text, condition, steps, seed, sampling, caches=False)
    model_video = _last_frames(vae, made, wanted)
    known = [frame for frame in wanted if frame < length]
    truth = torch.zeros_like(model_video)
    if known:
        truth[:, : len(known)] = _last_frames(
            vae, latents[:, :, : known[-1] + 1].split(1, 2), known
        )
    seconds = [frame * vae.config.time_factor / fps for frame in wanted]
    groups = [[(f"{i}\ntruth", truth[i]), ("model", model_video[i])] for i in range(len(latents))]
    scale = max(1, SHOWN_ROWS // truth.shape[2])
    return contact_sheet(groups, [f"{second:.3g} s" for second in seconds], scale)


def _last_frames(vae: CausalVAE, latents: Iterable[Tensor], wanted: Sequence[int]) -> Tensor:
    """The last video frame of each wanted latent frame: uint8 (B, len(wanted), H, W, 3)."""
    stream = (latent for _, latent in zip(range(wanted[-1] + 1), latents))
    return torch.stack([video[:, -1] for _, video in decode_frames(vae, stream, wanted)], dim=1)


def to_pixels(video: Tensor) -> Tensor:
    """Video (B, 3, F, H, W) in [-1, 1] as uint8 (B, F, H, W, 3); not-a-number becomes black."""
    return to_bytes(video).permute(0, 2, 3, 4, 1).cpu()
