"""Reads the motion of the camera off a video: a small regressor trained on rendered clips only.

It sees pixels and never a generator's weights or latents, so what it says of a generated video is
what the picture shows. Generated video is softer than rendered video; training therefore blurs,
dims and dusts its clips, each differently.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import load_module, save_module
from ..data.world import (
    FORWARD_STEP,
    FRAMES_PER_LATENT,
    THEMES,
    YAW_STEP,
    make_world,
    render,
    sample_trajectory,
)
from .metrics import correlation

FIRST_SEED = 5_000_000  # of the worlds it learns from: no other part of the project uses them
HELD_OUT_SEED = 5_500_000  # of the worlds it is validated on
CLIP_STEPS = 24  # latent frames per clip


@dataclass(frozen=True)
class ProbeConfig:
    """How the probe is trained. Clip i shows theme i modulo their number."""

    clips: int = 300
    held_out_clips: int = 24
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 2e-3
    shrink: int = 2  # pixels averaged along each side before it looks
    seed: int = 0


@dataclass(frozen=True)
class ProbeQuality:
    """Correlation of true and estimated motion on held-out rendered clips."""

    yaw: float
    forward: float


class MotionProbe(nn.Module):
    """The control (yaw, forward) of a latent frame from three video frames around it.

    They are the last frame of the latent frame before, its own second, and its own last one:
    the start, the middle and the end of its motion.
    """

    def __init__(self, height: int, width: int, shrink: int):
        super().__init__()
        self.height, self.width, self.shrink = height, width, shrink
        rows, columns = (-(-size // shrink // 8) for size in (height, width))
        self.layers = nn.Sequential(
            nn.Conv2d(9, 24, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * rows * columns, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        )

    def forward(self, triples: Tensor) -> Tensor:
        """triples (B, 9, h, w) as `shrink_triples` makes them; returns (B, 2)."""
        return self.layers(triples)

    @torch.no_grad()
    def estimate(self, video: Tensor) -> Tensor:
        """Controls (T, 2) that video uint8 (1 + 4 T, height, width, 3) seems to follow."""
        expected = (self.height, self.width, 3)
        if video.ndim != 4 or video.shape[1:] != expected or len(video) % FRAMES_PER_LATENT != 1:
            raise ValueError(
                f"video: expected (1 + {FRAMES_PER_LATENT}n, {self.height}, {self.width}, 3), "
                f"got {tuple(video.shape)}"
            )
        return self(shrink_triples(video[:: FRAMES_PER_LATENT // 2], self.shrink))


def shrink_triples(frames: Tensor, shrink: int) -> Tensor:
    """Every second frame of a clip, uint8 (1 + 2 T, H, W, 3), as (T, 9, H/shrink, W/shrink) in
    [-1, 1]: start, middle and end of each latent frame's motion."""
    small = F.avg_pool2d(frames.permute(0, 3, 1, 2).float() / 127.5 - 1, shrink)
    return torch.cat([small[:-2:2], small[1:-1:2], small[2::2]], dim=1)


def render_triples(
    seeds: Iterable[int], height: int, width: int, shrink: int
) -> tuple[Tensor, Tensor]:
    """Random walks through random worlds: triples (N, 9, h, w) and their controls (N, 2)."""
    triples, controls = [], []
    for seed in seeds:
        world = make_world(seed, seed % len(THEMES))
        walk, poses = sample_trajectory(world, CLIP_STEPS, np.random.default_rng(seed))
        frames = render(world, poses[:: FRAMES_PER_LATENT // 2], height, width)
        triples.append(shrink_triples(frames, shrink))
        controls.append(walk)
    return torch.cat(triples), torch.cat(controls)


def augment(triples: Tensor, controls: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored (which turns the yaw round), blurred, dimmed and dusted, at random per triple."""

    def draw(low: float, high: float) -> Tensor:
        shape = (len(triples), 1, 1, 1)
        return low + (high - low) * torch.rand(shape, generator=random)

    mirrored = draw(0, 1) < 0.5
    triples = torch.where(mirrored, triples.flip(-1), triples)
    yaw, forward = controls.unbind(-1)
    controls = torch.stack([torch.where(mirrored.flatten(), -yaw, yaw), forward], dim=-1)
    blurred = F.avg_pool2d(triples, 3, stride=1, padding=1, count_include_pad=False)
    triples = triples.lerp(blurred, draw(0, 1))
    triples = triples * draw(0.85, 1.1) + draw(-0.1, 0.1)
    noise = torch.randn(triples.shape, generator=random)
    return triples + draw(0, 0.06) * noise, controls


def train_probe(config: ProbeConfig, height: int, width: int) -> tuple[MotionProbe, ProbeQuality]:
    """A probe for videos of `height` x `width`, the same for the same arguments."""
    random = torch.Generator().manual_seed(config.seed)
    seeds = range(FIRST_SEED, FIRST_SEED + config.clips)
    triples, controls = render_triples(seeds, height, width, config.shrink)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        probe = MotionProbe(height, width, config.shrink)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    for _ in range(config.steps):
        chosen = torch.randint(len(triples), (config.batch,), generator=random)
        inputs, wanted = augment(triples[chosen], controls[chosen], random)
        loss = (probe(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    probe.eval().requires_grad_(False)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + config.held_out_clips)
    triples, controls = render_triples(seeds, height, width, config.shrink)
    yaw, forward = (correlation(a, b) for a, b in zip(probe(triples).T, controls.T))
    return probe, ProbeQuality(yaw, forward)


def load_probe(
    folder: Path, config: ProbeConfig, height: int, width: int
) -> tuple[MotionProbe, ProbeQuality]:
    """The probe of `folder`, trained first unless it is there: `motion-probe-<hash>.safetensors`.

    The hash covers the configuration and a sample of the world, so that a probe is never used
    for a world that looks or moves differently.
    """
    path = folder / f"motion-probe-{_fingerprint(config, height, width)}.safetensors"
    quality_path = path.with_suffix(".json")
    if path.is_file() and quality_path.is_file():
        probe = MotionProbe(height, width, config.shrink)
        load_module(path, probe)
        quality = ProbeQuality(**json.loads(quality_path.read_text()))
        return probe.eval().requires_grad_(False), quality
    probe, quality = train_probe(config, height, width)
    folder.mkdir(parents=True, exist_ok=True)
    save_module(path, probe)
    quality_path.write_text(json.dumps(asdict(quality)) + "\n")
    return probe, quality


def _fingerprint(config: ProbeConfig, height: int, width: int) -> str:
    settings = {**asdict(config), "height": height, "width": width}
    motion = {"yaw_step": YAW_STEP, "forward_step": FORWARD_STEP, "clip_steps": CLIP_STEPS}
    digest = hashlib.sha256(json.dumps({**settings, **motion}, sort_keys=True).encode())
    origin = torch.zeros(1, 3)
    for theme in range(len(THEMES)):
        frames = render(make_world(FIRST_SEED, theme), origin, height, width)
        digest.update(frames.numpy().tobytes())
    return digest.hexdigest()[:12]
