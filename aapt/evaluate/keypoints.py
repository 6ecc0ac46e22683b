"""Keypoints of the puppet, read from pixels by a small detector: AKD.

The detector sees pixels alone and is trained on rendered figures. Generated video is softer, so
each training image is blurred, dimmed and made noisy by another amount.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.tiny_puppet.clips import sample_puppet
from ..data.tiny_puppet.looks import LOOKS
from ..model.pose import POINTS
from . import network_cache

FIRST_SEED = 7_000_000  # of the detector's training figures, which are no others'
HELD_OUT_SEED = 7_500_000  # of the figures that give its score
CLIP_FRAMES = 3  # latent frames of a training clip
SPACING = 4  # video frames between two that are used
LEFT = [n for n, name in enumerate(POINTS) if name.startswith("left")]
RIGHT = [n for n, name in enumerate(POINTS) if name.startswith("right")]


@dataclass(frozen=True)
class KeypointDetectorConfig:
    """Settings of the detector's training."""

    clips: int = 800
    held_out_clips: int = 60
    steps: int = 700
    batch: int = 32
    learning_rate: float = 3e-3
    width: int = 40
    seed: int = 0


class KeypointDetector(nn.Module):
    """Finds the 14 points of `POINTS` in an image of the puppet."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.SiLU(),
        ]
        for dilation in (1, 2, 4, 2):
            layers.append(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation))
            layers += [nn.GroupNorm(4, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, len(POINTS), 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [-1, 1] to heat maps of logits (N, 14, H / 4, W / 4)."""
        return self.layers(images)

    @torch.no_grad()
    def find(self, video: Tensor) -> Tensor:
        """Find the points (..., 14, 2) in shares of width and height in uint8 (..., H, W, 3)."""
        images = video.flatten(0, -4).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = torch.cat([expected_places(self(part)) for part in images.split(64)])
        return found.unflatten(0, video.shape[:-3])


def expected_places(logits: Tensor) -> Tensor:
    """Compute the mean place (N, K, 2) of heat maps of logits (N, K, h, w), in shares of width and
    height, over the places within two of the highest."""
    height, width = logits.shape[-2:]
    heat = logits.flatten(-2).softmax(dim=-1).unflatten(-1, (height, width))
    peak = (heat == heat.amax(dim=(-2, -1), keepdim=True)).to(heat)
    heat = heat * F.max_pool2d(peak, 5, stride=1, padding=2)
    heat = heat / heat.sum(dim=(-2, -1), keepdim=True)
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    return torch.stack([(heat.sum(dim=-2) * x).sum(-1), (heat.sum(dim=-1) * y).sum(-1)], dim=-1)


def heat_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Compute the cross entropy of heat maps of logits (N, K, h, w) and places (N, K, 2) in shares
    of width and height. A place is shared bilinearly among the four nearest of a map, whose mean
    it then is."""
    height, width = logits.shape[-2:]
    most = torch.tensor([width - 1, height - 1])
    at = (places * (most + 1) - 0.5).clamp(min=torch.zeros(2), max=most.float())
    low = torch.minimum(at.long(), most - 1)
    share, chances = at - low, logits.flatten(-2).log_softmax(dim=-1)
    loss = torch.zeros(())
    for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = (share if x else 1 - share)[..., 0] * (share if y else 1 - share)[..., 1]
        index = (low[..., 1] + y) * width + low[..., 0] + x
        loss = loss - (weight * chances.gather(-1, index[..., None])[..., 0]).mean()
    return loss


def keypoint_distance(found: Tensor, commanded: Tensor, height: int, width: int) -> float:
    """Compute the average keypoint distance (AKD) in pixels.

    found, commanded: (..., K, 2) in shares of the image's width and height. ValueError for
    different shapes.
    """
    if found.shape != commanded.shape:
        raise ValueError(f"keypoints: expected {tuple(commanded.shape)}, got {tuple(found.shape)}")
    size = torch.tensor([width, height], dtype=torch.float64)
    return ((found.double() - commanded.double()) * size).norm(dim=-1).mean().item()


def figures(first_seed: int, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Render figures with every look in turn: images (N, 3, H, W) in [-1, 1] and their points
    (N, 14, 2)."""
    images, points = [], []
    for index in range(count):
        puppet = sample_puppet(
            first_seed + index, CLIP_FRAMES, look=index % len(LOOKS), height=height, width=width
        )
        video = puppet.render(slice(None, None, SPACING))
        images.append(video.permute(0, 3, 1, 2).float() / 127.5 - 1)
        points.append(torch.from_numpy(puppet.points[::SPACING, :, :2]).float())
    return torch.cat(images), torch.cat(points)


def augment(images: Tensor, points: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror (which swaps left and right), blur, dim and add noise, by another amount each."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(images), 1, 1, 1), generator=random)

    mirrored = draw(0, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    swapped = points.clone()
    swapped[:, LEFT + RIGHT] = points[:, RIGHT + LEFT]
    swapped[..., 0] = 1 - swapped[..., 0]
    points = torch.where(mirrored[..., 0], swapped, points)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = images.lerp(blurred, draw(0, 1)) * draw(0.85, 1.1) + draw(-0.1, 0.1)
    return images + draw(0, 0.06) * torch.randn(images.shape, generator=random), points


def train_detector(
    config: KeypointDetectorConfig, height: int, width: int
) -> tuple[KeypointDetector, list[float]]:
    """Train a detector for images of `height` x `width`; equal arguments give equal detectors.

    Returns it with its own AKD in pixels on held-out figures.
    """
    random = torch.Generator().manual_seed(config.seed)
    images, points = figures(FIRST_SEED, config.clips, height, width)

    def loss(detector: KeypointDetector) -> Tensor:
        chosen = torch.randint(len(images), (config.batch,), generator=random)
        shown, places = augment(images[chosen], points[chosen], random)
        return heat_loss(detector(shown), places)

    detector = network_cache.train_network(lambda: KeypointDetector(config.width), config, loss)
    unseen, true = figures(HELD_OUT_SEED, config.held_out_clips, height, width)
    found = torch.cat([expected_places(detector(part)) for part in unseen.split(64)])
    return detector, [keypoint_distance(found, true, height, width)]


def load_detector(
    folder: Path, config: KeypointDetectorConfig, height: int, width: int
) -> tuple[KeypointDetector, float]:
    """Read the detector and its own AKD from the cache `folder`, or train it and keep it there.

    The file is `keypoint-detector-<hash>.safetensors`. The hash covers the configuration and a
    sample of the figures.
    """
    path = folder / f"keypoint-detector-{_fingerprint(config, height, width)}.safetensors"
    detector, (score,) = network_cache.read_or_train(
        path,
        "keypoint detector",
        lambda: KeypointDetector(config.width),
        lambda: train_detector(config, height, width),
        scores=1,
    )
    return detector, score


def _fingerprint(config: KeypointDetectorConfig, height: int, width: int) -> str:
    """Hash everything that the trained detector depends on."""
    settings = {**asdict(config), "height": height, "width": width, "frames": CLIP_FRAMES}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    images, points = figures(FIRST_SEED, len(LOOKS), height, width)
    digest.update(np.ascontiguousarray(images.numpy()).tobytes())
    digest.update(np.ascontiguousarray(points.numpy().round(4)).tobytes())
    return digest.hexdigest()[:12]
