"""Read the camera's motion from a video: block matching, and a small regressor on top.

The probe sees pixels, never a generator's weights or latents, and so reads the motion that the
video shows. It is trained on rendered clips. Generated video is softer, so each training clip is
blurred, dimmed and made noisy by another amount.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clock import FRAMES_PER_LATENT
from ..data.tiny_world.render import render
from ..data.tiny_world.themes import THEMES
from ..data.tiny_world.world import FORWARD_STEP, YAW_STEP, make_world, sample_trajectory
from . import network_cache
from .metrics import correlation

FIRST_SEED = 5_000_000  # of the probe's training worlds: no other part of the project uses them
HELD_OUT_SEED = 5_500_000  # of the worlds that give its quality
CLIP_STEPS = 24  # latent frames per clip
CELL = 8  # side of a matched cell in shrunk pixels
REACH = 2, 6  # largest shift down and across: a full turn moves the edge of 64 columns by 5
FLAT = 0.02  # smaller differences are noise: a cell without structure matches everywhere


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the probe's training. Clip i shows the theme i modulo the number of themes."""

    clips: int = 300
    held_out_clips: int = 24
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 2e-3
    shrink: int = 2  # pixels that are averaged along each side first
    seed: int = 0


@dataclass(frozen=True)
class ProbeQuality:
    """Correlation of true and estimated motion on held-out rendered clips."""

    yaw: float
    forward: float


class MotionProbe(nn.Module):
    """Reads the control (yaw, forward) of a latent frame from three video frames.

    These are the last of the latent frame before, and the second and the last of the latent frame:
    the start, the middle and the end of its motion.
    """

    def __init__(self, height: int, width: int, shrink: int):
        super().__init__()
        self.height, self.width, self.shrink = height, width, shrink
        shifts = 2 * len(_shifts())
        cells = (height // shrink // CELL) * (width // shrink // CELL)
        self.layers = nn.Sequential(
            nn.Conv2d(shifts, 48, 1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * cells, 64),
            nn.SiLU(),
            nn.Linear(64, 2),
        )

    def forward(self, costs: Tensor) -> Tensor:
        """Map the result of `matching_costs` to controls (B, 2)."""
        return self.layers(costs)

    @torch.no_grad()
    def estimate(self, video: Tensor) -> Tensor:
        """Read controls (T, 2) from a video, uint8 (1 + 4 T, height, width, 3)."""
        expected = (self.height, self.width, 3)
        if video.ndim != 4 or video.shape[1:] != expected or len(video) % FRAMES_PER_LATENT != 1:
            raise ValueError(
                f"video: expected (1 + {FRAMES_PER_LATENT}n, {self.height}, {self.width}, 3), "
                f"got {tuple(video.shape)}"
            )
        return self(matching_costs(shrink_triples(video[:: FRAMES_PER_LATENT // 2], self.shrink)))


def matching_costs(triples: Tensor) -> Tensor:
    """Compute how badly each cell of an image matches the next one under each shift.

    triples: (B, 9, h, w). Returns (B, 2 shifts, h / CELL, w / CELL): mean absolute differences of
    start and middle, then of middle and end. Each is divided by its mean over the shifts, so that
    brightness and contrast cancel.
    """
    start, middle, end = triples.chunk(3, dim=1)
    return torch.cat([_costs(start, middle), _costs(middle, end)], dim=1)


def _costs(here: Tensor, there: Tensor) -> Tensor:
    channels, height, width = here.shape[1:]
    reach_y, reach_x = REACH
    here, there = (x.transpose(0, 1).contiguous() for x in (here, there))  # quick to sum over
    padded = F.pad(there, (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    costs = []
    for y, x in _shifts():
        difference = (here - padded[..., y : y + height, x : x + width]).abs_().sum(0)
        costs.append(F.avg_pool2d(difference.div_(channels), CELL))
    costs = torch.stack(costs, dim=1)
    return costs / (costs.mean(dim=1, keepdim=True) + FLAT) - 1


def _shifts() -> list[tuple[int, int]]:
    """List offsets (y, x) into an image padded by REACH."""
    return list(itertools.product(*(range(2 * reach + 1) for reach in REACH)))


def shrink_triples(frames: Tensor, shrink: int) -> Tensor:
    """Take start, middle and end of each latent frame's motion as one image of 9 channels.

    frames: every second video frame of a clip, uint8 (1 + 2 T, H, W, 3). Returns (T, 9, H / shrink,
    W / shrink) in [-1, 1].
    """
    small = F.avg_pool2d(frames.permute(0, 3, 1, 2).float() / 127.5 - 1, shrink)
    return torch.cat([small[:-2:2], small[1:-1:2], small[2::2]], dim=1)


def render_costs(
    seeds: Iterable[int],
    height: int,
    width: int,
    shrink: int,
    random: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Render random walks through random worlds.

    Returns matching costs (N, ...) and controls (N, 2). The images are augmented if `random` is
    given.
    """
    costs, controls = [], []
    for seed in seeds:
        world = make_world(seed, seed % len(THEMES))
        walk, poses = sample_trajectory(world, CLIP_STEPS, np.random.default_rng(seed))
        frames = render(world, poses[:: FRAMES_PER_LATENT // 2], height, width)
        triples = shrink_triples(frames, shrink)
        if random is not None:
            triples, walk = augment(triples, walk, random)
        costs.append(matching_costs(triples))
        controls.append(walk)
    return torch.cat(costs), torch.cat(controls)


def augment(triples: Tensor, controls: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror (which negates the yaw), blur, dim and add noise, by another amount for each triple.

    triples: (N, 9, h, w). controls: (N, 2). Returns both, changed.
    """

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
    """Train a probe for videos of `height` x `width`; equal arguments give equal probes."""
    random = torch.Generator().manual_seed(config.seed)
    seeds = range(FIRST_SEED, FIRST_SEED + config.clips)
    costs, controls = render_costs(seeds, height, width, config.shrink, random)

    def loss(probe: MotionProbe) -> Tensor:
        chosen = torch.randint(len(costs), (config.batch,), generator=random)
        return (probe(costs[chosen]) - controls[chosen]).square().mean()

    probe = network_cache.train_network(
        lambda: MotionProbe(height, width, config.shrink), config, loss
    )
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + config.held_out_clips)
    unseen, true = render_costs(seeds, height, width, config.shrink)
    yaw, forward = (correlation(a, b) or 0.0 for a, b in zip(probe(unseen).T, true.T))
    return probe, ProbeQuality(yaw, forward)


def load_probe(
    folder: Path, config: ProbeConfig, height: int, width: int
) -> tuple[MotionProbe, ProbeQuality]:
    """Read the probe from the cache `folder`, or train it and keep it there.

    The file is `motion-probe-<hash>.safetensors`. The hash covers the configuration and a sample of
    the world, so that a probe never meets a world that looks or moves differently.
    """
    path = folder / f"motion-probe-{_fingerprint(config, height, width)}.safetensors"

    def train() -> tuple[MotionProbe, list[float]]:
        probe, quality = train_probe(config, height, width)
        return probe, [quality.yaw, quality.forward]

    probe, quality = network_cache.read_or_train(
        path, "motion probe", lambda: MotionProbe(height, width, config.shrink), train, scores=2
    )
    return probe, ProbeQuality(*quality)


def _fingerprint(config: ProbeConfig, height: int, width: int) -> str:
    """Hash everything that the trained probe depends on."""
    settings = {**asdict(config), "height": height, "width": width}
    motion = {"yaw_step": YAW_STEP, "forward_step": FORWARD_STEP, "clip_steps": CLIP_STEPS}
    digest = hashlib.sha256(json.dumps({**settings, **motion}, sort_keys=True).encode())
    origin = torch.zeros(1, 3)
    for theme in range(len(THEMES)):
        frames = render(make_world(FIRST_SEED, theme), origin, height, width)
        digest.update(frames.numpy().tobytes())
    return digest.hexdigest()[:12]
