"""Sheets of frames from a generator in training."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from ..clock import FPS, STEPS_PER_SECOND
from ..data.clips import ClipBatch
from ..media.contact_sheet import SHOWN_ROWS, contact_sheet
from ..model.config import FewStepConfig, SamplingConfig
from ..model.world_model import WorldModel
from ..streaming.rollout import decode_frames, roll_out, starting_over
from ..vae import CausalVAE

SAMPLES = 3  # clips of a sheet
DIFFUSION_SAMPLES = (0, 1, 2, 4, 6)  # latent frames of a sheet of a diffusion stage


@torch.no_grad()
def sample_sheet(
    model: WorldModel,
    vae: CausalVAE,
    batch: ClipBatch,
    frames: Sequence[int],
    *,
    seed: int = 0,
    sampling: SamplingConfig | FewStepConfig | None = None,
    fps: int = FPS,
    statistics: "LatentStatistics | None" = None,
) -> Image.Image:
    """Roll the generator out from the first frames of a batch and draw it under the real clips.

    The sheet has two rows per clip, and one column for each of the latent `frames`, counted from
    the first. If a rollout is longer than its clip, the clip's motion starts over and the real row
    is blank. The same batch and seed give the same noise, so that sheets can be compared.

    Args:
        sampling: How a diffusion or few-step model makes a frame; None for a generator of one pass.
            A diffusion model is sampled without caches, because training leaves no memory for them:
            the work grows with the square of the last frame.
        fps: Video frames per second, for the labels of columns.
        statistics: Gathers the frames of the rollout.
    """
    wanted = sorted(set(frames))
    if not wanted or wanted[0] < 0:
        raise ValueError(f"frames: expected latent frames from 0 on, got {list(frames)}")
    latents, length = batch.latents, batch.latents.shape[2]
    channels, *text = model.conditions(batch.motion, batch.prompts, latents.shape[-2:])
    condition = starting_over(channels)
    first, steps = latents[:, :, :1], wanted[-1]
    made = roll_out(model, first, text, condition, steps, seed, sampling, caches=False)
    if statistics:
        made = statistics.gathering(made)
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


class LatentStatistics:
    """Statistics of latent frames, gathered one by one.

    Attributes:
        changes: Root mean square of the change from each frame to the next.
        means: Spatial mean of each frame's channels, (B, C) each.
        deviations: Deviation of each frame's numbers about these means.
    """

    def __init__(self):
        self.changes: list[float] = []
        self.means: list[Tensor] = []
        self.deviations: list[float] = []
        self._before: Tensor | None = None

    def gathering(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield frames (B, C, 1, H, W) as they come, and gather them."""
        for frame in frames:
            latent = frame.float()
            if self._before is not None:
                self.changes.append(_root_mean_square(latent - self._before))
            mean = latent.mean(dim=(2, 3, 4))
            self.means.append(mean.cpu())
            self.deviations.append(_root_mean_square(latent - mean[:, :, None, None, None]))
            self._before = latent
            yield frame


def measures(made: LatentStatistics, latents: Tensor) -> dict[str, float]:
    """Compare a rollout with the real clips (B, C, T, H, W) from whose first frames it starts.

    Returns `motion`, the change from frame to frame relative to the clips', over their length;
    `late_motion` and `late_deviation`, in the rollout's last second; and `colour_shift`, from the
    clips' mean colours to the last second's, in units of the latents.
    """
    real = LatentStatistics()
    for _ in real.gathering(latents.split(1, dim=2)):
        pass
    late = slice(-STEPS_PER_SECOND, None)
    shift = torch.stack(made.means[late]).mean(0) - torch.stack(real.means).mean(0)
    motion = max(fmean(real.changes), 1e-6)
    return {
        "motion": fmean(made.changes[: len(real.changes)]) / motion,
        "late_motion": fmean(made.changes[late]) / motion,
        "late_deviation": fmean(made.deviations[late]) / max(fmean(real.deviations), 1e-6),
        "colour_shift": _root_mean_square(shift),
    }


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _last_frames(vae: CausalVAE, latents: Iterable[Tensor], wanted: Sequence[int]) -> Tensor:
    """The last video frame of each wanted frame: uint8 (B, len(wanted), H, W, 3)."""
    stream = (latent for _, latent in zip(range(wanted[-1] + 1), latents))
    return torch.stack([video[:, -1] for _, video in decode_frames(vae, stream, wanted)], dim=1)
