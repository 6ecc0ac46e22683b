"""Videos from a generator while it is trained: batched rollouts, and a sheet of them."""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..clock import FPS
from ..data.clips import ClipBatch
from ..media.contact_sheet import SHOWN_ROWS, contact_sheet
from ..model.config import SamplingConfig
from ..model.world_model import WorldModel
from ..streaming.rollout import decode_frames, roll_out, starting_over
from ..vae import CausalVAE


@torch.no_grad()
def sample_sheet(
    model: WorldModel,
    vae: CausalVAE,
    batch: ClipBatch,
    frames: Sequence[int],
    *,
    seed: int = 0,
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
    seconds = [frame * vae.config.time_factor / FPS for frame in wanted]
    groups = [[(f"{i}\ntruth", truth[i]), ("model", model_video[i])] for i in range(len(latents))]
    scale = max(1, SHOWN_ROWS // truth.shape[2])
    return contact_sheet(groups, [f"{second:.3g} s" for second in seconds], scale)


def _last_frames(vae: CausalVAE, latents: Iterable[Tensor], wanted: Sequence[int]) -> Tensor:
    """The last video frame of each wanted latent frame: uint8 (B, len(wanted), H, W, 3)."""
    stream = (latent for _, latent in zip(range(wanted[-1] + 1), latents))
    return torch.stack([video[:, -1] for _, video in decode_frames(vae, stream, wanted)], dim=1)
