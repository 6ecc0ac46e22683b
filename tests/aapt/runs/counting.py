"""Clips and models that count: frame i of clip c is 100 c + i, so that a value names its source."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aapt.data.clips import LatentClips
from aapt.model.conditioning import control_rays
from aapt.model.discriminator import Discriminator
from aapt.model.world_model import WorldModel
from aapt.training.optimization import Schedule
from aapt.training.stages.adversarial import Adversarial, AdversarialConfig

from ..helpers import CAMERA, SIZE, clips, draws, tiny_model


def model() -> WorldModel:
    return tiny_model(sink_distance="clamped", residual_head=True, output_clamp=4.0).float()


def counting_clips(length: int = 12) -> LatentClips:
    """Clip c of four has frames 100 c + i, controls (n + 1) / 100 and a prompt of c bytes."""
    frame = 100.0 * torch.arange(4)[:, None] + torch.arange(length)
    motion = torch.arange(1, length) / 100
    return LatentClips(
        frame[:, None, :, None, None].expand(-1, 4, -1, *SIZE),
        motion[:, None].expand(4, -1, 2),
        [("x" * c,) for c in range(4)],
    )


def value(x: Tensor) -> Tensor:
    """The numbers (B, T) with which frames (B, C, T, H, W) are filled."""
    torch.testing.assert_close(x, x[:, :1, :, :1, :1].expand_as(x), rtol=0, atol=1e-4)
    return x[:, 0, :, 0, 0].detach()


def assert_drives(condition: Tensor, rows: Tensor) -> None:
    """Check that `condition` is made of the controls of frames `rows` (B, T) of counted clips.

    A wrong row moves it by 0.014. Stages compute it in half precision.
    """
    motion = (rows % 100 / 100)[..., None].expand(-1, -1, 2)
    expected = control_rays(motion, CAMERA, *SIZE)
    torch.testing.assert_close(condition, expected, rtol=0, atol=2e-3)


def prompted(frames: Tensor) -> list[str]:
    """The prompts of counted clips, from the values of their frames."""
    return ["x" * int(clip) for clip in frames[:, 0] // 100]


def counting_model(*increments: float) -> WorldModel:
    """A model that adds `increments`, by channel, to the recycled frame, whatever else it gets."""
    net = tiny_model(depth=1, residual_head=True).float()
    out = net.transformer.video_out
    nn.init.zeros_(out.weight)
    with torch.no_grad():
        out.bias.copy_(torch.tensor(increments).repeat(4))
    return net


class Recorder(nn.Module):
    """A transformer that records its arguments and returns gain * x_t."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.calls = []

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        self.calls.append((x.detach(), *arguments))
        return self.gain * x


def recorded(gain: float, **changes) -> WorldModel:
    net = tiny_model(depth=1, **changes).float()
    net.transformer = Recorder(gain)
    return net


def recovered_noise(x_t: Tensor, recycled: Tensor, t: Tensor) -> Tensor:
    """The noise e in x_t = (1 - t) x_0 + t e, where x_0 of counted clips is recycled + 1.

    Another x_0 or t would leave a multiple of x_0, which is in the hundreds.
    """
    t = t[:, None, None, None, None]
    noise = (x_t - (1 - t) * (recycled + 1)) / t
    assert noise.mean(dim=(1, 2, 3, 4)).abs().max() < 0.4
    assert (noise.std(dim=(1, 3, 4)) - 1).abs().max() < 0.4
    return noise


def train(stage, steps, data=None, seed=0):
    """The metrics of the first updates, one dictionary each."""
    sets = {"clips": data or clips()}
    metrics = []
    for step in range(steps):
        seen = stage.accumulate(sets, draws(stage.batch(step), seed, step), step)
        metrics.append(seen | stage.update(step))
    return metrics


def diffusion_weights() -> WorldModel:
    """Weights of stage 1 that differ from the generator's everywhere."""
    diffusion = model()
    with torch.no_grad():
        diffusion.text_encoder.embedding.weight.add_(1)
    return diffusion


def adversarial_stage(
    generator: WorldModel | None = None, place: Callable | None = None, **changes
) -> Adversarial:
    """A small stage; `place` is called with each of its networks first."""
    options = {
        "clips": "clips",
        "steps": 4,
        "generator_schedule": Schedule(1e-3),
        "discriminator_schedule": Schedule(1e-3),
        "batch": 2,
        "segment_frames": 3,
        "whole_clips": True,
        "first_frame": "half",
        **changes,
    }
    config = AdversarialConfig(**options)
    discriminator = Discriminator(diffusion_weights(), config.judgement, config.pooling)
    networks = generator or model(), discriminator
    if place:
        for network in networks:
            place(network)
    return Adversarial(
        config,
        *networks,
        torch.tensor([3.0, 1.0, 2.0, 2.0]),
    )
