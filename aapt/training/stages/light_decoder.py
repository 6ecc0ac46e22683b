"""The light decoder stage: trains a cheaper decoder for existing latents (docs/method.md#9).

Encoder and latents do not change, so a generator that was trained with the original decoder also
works with the light one. The light decoder learns to reconstruct the clip, and to imitate the
original decoder on the same latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.clips import VideoClips
from ...data.randomness import ClipRandom
from ...device import mixed_precision
from ...model.flow import per_clip
from ...vae import CausalVAE, VAEConfig
from ..losses import (
    approximate_penalty,
    discriminator_loss,
    flicker_loss,
    generator_loss,
    reconstruction_loss,
    reconstruction_psnr,
    seam_loss,
    sharpened,
)
from ..optimization import MovingAverage, Schedule, Trained, frozen

TOKEN = 2  # latent pixels along each side of a generator's token
LAPPED_RATE = 0.1  # learning rate of a lapped map, as a share of the network's
# Fields that may differ from the original's, because no encoder reads them
LIGHTER = {"decoder_channels", "decoder_blocks", "latent_projection", "lapped"}


@dataclass(frozen=True)
class PatchAdversary:
    """Numbers of an adversarial loss by a discriminator of patches.

    Attributes:
        weight: Weight of the adversarial loss in the decoder's loss.
        warmup: Updates of the discriminator alone, before the decoder gets the adversarial loss.
        width, depth: Shape of the `PatchDiscriminator`.
        penalty, perturbation: lambda and sigma of aR1 and aR2, as in stage 3 (docs/method.md#8).
    """

    schedule: Schedule
    weight: float
    warmup: int = 0
    width: int = 32
    depth: int = 3
    penalty: float = 10.0
    perturbation: float = 0.1


@dataclass(frozen=True)
class LightDecoderConfig:
    """Numbers of the light decoder stage.

    Attributes:
        shape: Shape of the light autoencoder; None for `lighter` of the original's shape.
        squares, edges: Weights of the squared error and the edge error, beside the absolute error.
        imitation: Weight of the error against the original decoder, beside the error against the
            clip.
        seams: Weight of the error's steps across borders of cells of one latent pixel.
        sharpening: Amount by which the clips to reconstruct are `sharpened`.
        flicker: Weight of the change of the error from each video frame to the next.
        perceptual: Weight of a `PerceptualDistance` to the clip, if a network is given.
        adversary: An adversarial loss; None for none.
        fit_noise: Deviation of the noise on latents, in their deviations, that the closed form of a
            lapped map expects.
        latent_noise: Greatest strength of white noise on the latents, in deviations, drawn for each
            clip from 0 to this. The decoder so learns to clean a generator's errors.
        token_noise: Strength, as a share of the white noise, of noise that is one for all latent
            pixels of a token: a generator errs by token, and the decoder so learns to hide it.
        average: Decay of the moving average that is exported.
        max_norm: Norm to which gradients are clipped.
    """

    schedule: Schedule
    steps: int
    batch: int
    video_frames: int
    shape: VAEConfig | None = None
    clips: str = "clips"
    squares: float = 1.0
    edges: float = 0.5
    imitation: float = 1.0
    seams: float = 0.0
    sharpening: float = 0.0
    flicker: float = 1.0
    perceptual: float = 1.0
    adversary: PatchAdversary | None = None
    fit_noise: float = 0.06
    latent_noise: float = 0.4
    token_noise: float = 0.0
    average: float = 0.995
    max_norm: float = 1.0


def light_vae_for(original: CausalVAE, shape: VAEConfig) -> CausalVAE:
    """Make an autoencoder of `shape` with the encoder, linear map and latents of `original`.

    Its decoder starts from those weights of the original decoder that fit by name and shape.
    ValueError if `shape` has another encoder.
    """
    given, expected = asdict(shape), asdict(original.config)
    free = LIGHTER if original.encoder else LIGHTER | {"padding"}
    for name, value in expected.items():
        if name not in free and given[name] != value:
            raise ValueError(f"{name}: expected {value}, as the original has, got {given[name]}")
    light = CausalVAE(shape)
    weights, theirs = light.state_dict(), original.state_dict()
    fitting = {n: x for n, x in theirs.items() if n in weights and weights[n].shape == x.shape}
    light.load_state_dict(weights | fitting)
    return light.to(original.latent_mean.device)


def generator_noise(random: ClipRandom, shape: Sequence[int], by_token: float) -> Tensor:
    """Draw noise (clips, *shape) for latents of `shape` (C, T, H, W): white, plus `by_token` times
    noise that is one for all latent pixels of a token."""
    noise = random.normal(*shape)
    if not by_token:
        return noise
    *_, height, width = shape
    tokens = random.normal(*shape[:2], -(-height // TOKEN), -(-width // TOKEN))
    tokens = tokens.repeat_interleave(TOKEN, -2).repeat_interleave(TOKEN, -1)
    return noise + by_token * tokens[..., :height, :width]


class LightDecoderTraining:
    """Trains a light decoder on errors against the clip and against the original decoder."""

    def __init__(
        self,
        config: LightDecoderConfig,
        original: CausalVAE,
        light: CausalVAE,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.config = config
        self.original, self.light = original.requires_grad_(False), light.requires_grad_(False)
        self.perceptual = perceptual
        self.steps = config.steps
        decoder = light.decoder.requires_grad_(True)
        parts = dict(decoder.named_parameters())
        groups = [{"params": [p for name, p in parts.items() if not name.startswith("lapped.")]}]
        if decoder.lapped is not None:
            # It starts at its best, and its weights are small next to Adam's steps
            groups.append({"params": list(decoder.lapped.parameters()), "scale": LAPPED_RATE})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        average = MovingAverage(decoder, config.average, from_scratch=True)
        self.trained = {"decoder": Trained(decoder, optimizer, average)}
        self.discriminator = None
        if adversary := config.adversary:
            self.discriminator = PatchDiscriminator(adversary.width, adversary.depth)
            self.discriminator.to(light.latent_mean.device)
            optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.0, 0.99))
            self.trained["discriminator"] = Trained(self.discriminator, optimizer)

    def batch(self, step: int) -> int:
        return self.config.batch

    def accumulate(
        self, sets: Mapping[str, VideoClips], random: ClipRandom, step: int, share: float = 1.0
    ) -> dict[str, float]:
        config = self.config
        video = sets[config.clips].sample(random, config.video_frames)
        with mixed_precision(video.device), torch.no_grad():
            latent = self.original.encode(video)
            noise = generator_noise(random, latent.shape[1:], config.token_noise)
            latent = latent + per_clip(config.latent_noise * random.uniform()) * noise
            target = self.original.decode(latent).float() if config.imitation else None
        with mixed_precision(video.device):
            decoded = self.light.decode(latent).float()

        wanted = sharpened(video, config.sharpening) if config.sharpening else video
        losses = self.losses(decoded, wanted, target)
        metrics = {
            "psnr": reconstruction_psnr(decoded.detach(), video),
        }
        if target is not None:
            metrics["original_psnr"] = reconstruction_psnr(target, video)
        if self.discriminator:
            metrics |= self.train_discriminator(video, decoded.detach(), random, share)
            if step >= config.adversary.warmup:
                losses["adversarial"] = config.adversary.weight * self.realism(video, decoded)
        loss = sum(losses.values())
        (share * loss).backward()
        return {"loss": loss.item(), **{n: x.item() for n, x in losses.items()}, **metrics}

    def losses(self, decoded: Tensor, video: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The weighted losses. `target` is the original decoder's video of the same latents; None
        without imitation."""
        config, error = self.config, decoded - video
        weights = config.squares, config.edges
        losses = {"reconstruction": reconstruction_loss(error, *weights)}
        if config.imitation:
            loss = reconstruction_loss(decoded - target, *weights)
            losses["imitation"] = config.imitation * loss
        if config.seams:
            cell = self.light.config.space_factor
            losses["seams"] = config.seams * seam_loss(error, cell)
        if config.flicker:
            losses["flicker"] = config.flicker * flicker_loss(error)
        if self.perceptual and config.perceptual:
            losses["perceptual"] = config.perceptual * self.perceptual(decoded, video)
        return losses

    def train_discriminator(
        self, video: Tensor, decoded: Tensor, random: ClipRandom, share: float
    ) -> dict[str, float]:
        """Accumulate the discriminator's gradients."""
        adversary = self.config.adversary
        shown = [video, decoded]
        shown += [x + adversary.perturbation * random.normal(*x.shape[1:]) for x in shown]
        on_real, on_fake, near_real, near_fake = self.logits(torch.cat(shown)).chunk(4)
        loss = discriminator_loss(on_real, on_fake)
        penalty = approximate_penalty(on_real, near_real) + approximate_penalty(on_fake, near_fake)
        (share * (loss + adversary.penalty * penalty)).backward()
        accuracy = (on_real > on_fake).float().mean()
        return {
            "discriminator": loss.item(),
            "penalty": adversary.penalty * penalty.item(),
            "accuracy": accuracy.item(),
        }

    def realism(self, video: Tensor, decoded: Tensor) -> Tensor:
        """The adversarial loss of the decoder. The discriminator has not moved since its turn."""
        with frozen(self.discriminator):
            with torch.no_grad():
                on_real = self.logits(video)
            return generator_loss(on_real, self.logits(decoded))

    def logits(self, video: Tensor) -> Tensor:
        """The discriminator's logits (B, F, H', W') of a video (B, 3, F, H, W), in float32."""
        with mixed_precision(video.device):
            return self.discriminator(video).float()

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.schedule(step, self.steps)
        norms = {"gradient": self.trained["decoder"].update(rate, config.max_norm)}
        if self.discriminator:
            rate = config.adversary.schedule(step, self.steps)
            discriminator = self.trained["discriminator"]
            norms["discriminator_gradient"] = discriminator.update(rate, config.max_norm)
        return norms

    def export(self) -> CausalVAE:
        self.trained["decoder"].export()
        return self.light


class PatchDiscriminator(nn.Module):
    """A discriminator with one logit per patch of a video (Isola et al., 2017).

    Its strided convolutions read three video frames each, so that they see flicker. Patches are
    2^depth pixels apart. The first layer has `width` channels; each further layer has twice the
    channels of the one before.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        widths = [3, *(width * 2**i for i in range(depth))]
        self.layers = nn.ModuleList(
            nn.Conv3d(wide, wider, (3, 4, 4), stride=(1, 2, 2), padding=1)
            for wide, wider in zip(widths, widths[1:])
        )
        self.logit = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        """Logits (B, F, H / 2^depth, W / 2^depth) of a video (B, 3, F, H, W) in [-1, 1]."""
        x = video
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.logit(x).squeeze(1)
