"""The decoder stage: trains the decoder of a causal video VAE by reconstruction (docs/method.md#9).

The encoder, fitted in closed form or given, does not change. Latents are therefore final before the
stage begins.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.clips import VideoClips
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.flow import per_clip
from ...vae import CausalVAE, VAEConfig
from ...vae.pixels import to_video
from ..losses import reconstruction_loss, reconstruction_psnr
from ..optimization import MovingAverage, Schedule, Trained


@dataclass(frozen=True)
class DecoderConfig:
    """Numbers of the decoder stage.

    Attributes:
        steps: Number of updates.
        batch: Clips per update.
        video_frames: Video frames per clip.
        edges, squares: Weights of the edge error and the squared error, beside the absolute error.
        latent_noise: Greatest strength of white noise on the latents, in deviations, drawn for each
            clip from 0 to this. The decoder so learns to clean a generator's errors.
        average: Decay of the moving average that is exported.
        max_norm: Norm to which gradients are clipped.
    """

    schedule: Schedule
    steps: int
    batch: int
    video_frames: int
    clips: str = "clips"
    edges: float = 0.5
    squares: float = 1.0
    latent_noise: float = 0.4
    average: float = 0.995
    max_norm: float = 1.0


class DecoderTraining:
    """Trains a decoder on absolute, squared and edge errors of its reconstructions."""

    def __init__(self, config: DecoderConfig, vae: CausalVAE):
        self.config = config
        self.vae = vae
        self.steps = config.steps
        vae.requires_grad_(False)
        decoder = vae.decoder.requires_grad_(True)
        optimizer = torch.optim.Adam(decoder.parameters(), betas=(0.9, 0.99))
        average = MovingAverage(decoder, config.average, from_scratch=True)
        self.trained = {"decoder": Trained(decoder, optimizer, average)}

    def batch(self, step: int) -> int:
        return self.config.batch

    def accumulate(
        self, sets: Mapping[str, VideoClips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        config, vae = self.config, self.vae
        video = sets[config.clips].sample(random, config.video_frames)
        with mixed_precision(video.device):
            latent = vae.encode(video)
            strength = config.latent_noise * random.uniform()
            noise = random.normal(*latent.shape[1:])
            decoded = vae.decode(latent + per_clip(strength) * noise)
        decoded = decoded.float()
        loss = reconstruction_loss(decoded - video, config.squares, config.edges)
        (share * loss).backward()
        return {"loss": loss.item(), "psnr": reconstruction_psnr(decoded.detach(), video)}

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.schedule(step, self.steps)
        return {"gradient": self.trained["decoder"].update(rate, config.max_norm)}

    def export(self) -> CausalVAE:
        self.trained["decoder"].export()
        return self.vae


def fit_linear(config: VAEConfig, videos: Tensor) -> CausalVAE:
    """Make an autoencoder whose linear map is fitted in closed form, and measure its latents.

    videos: uint8 (clips, F, H, W, 3). The decoder's network is untrained.
    """
    vae = CausalVAE(config)
    vae.linear.fit(to_video(videos))
    measure_latents(vae, (to_video(video[None]) for video in videos))
    return vae


@torch.no_grad()
def measure_latents(vae: CausalVAE, videos: Iterable[Tensor]) -> None:
    """Set a VAE's latent mean and deviation to those of `videos`, each (B, 3, F, H, W)."""
    vae.latent_mean.zero_()
    vae.latent_std.fill_(1)
    latents = torch.cat([vae.encode(video).transpose(0, 1).flatten(1) for video in videos], dim=1)
    deviation, mean = torch.std_mean(latents, dim=1)
    vae.latent_mean.copy_(mean.view_as(vae.latent_mean))
    vae.latent_std.copy_(deviation.view_as(vae.latent_std))
