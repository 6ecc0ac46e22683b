"""Find the objects of the tiny world in pictures: a small convolutional detector.

The detector sees pixels alone. It is trained on rendered pictures, whose boxes the renderer knows.
Generated pictures are softer, so each training picture is blurred and made noisy by another amount.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.tiny_world import boxes as truth
from ..data.tiny_world.boxes import CLASSES, Boxes, object_boxes
from ..data.tiny_world.render import render
from ..data.tiny_world.themes import THEMES
from ..data.tiny_world.world import make_world, sample_trajectory
from . import network_cache

FIRST_SEED = 7_000_000  # of the detector's training worlds, which are no others'
HELD_OUT_SEED = 7_500_000  # of the worlds that give its quality
WALK_STEPS = 24  # latent frames between two pictures of a world
GROUPS = 4  # of channels that are normed together
STRIDE = 4  # pixels of a cell, along each side
CENTRE = 0.25  # a cell learns an object if its centre is this share of the sides from the middle
SURE = 0.4  # least probability of a found object
SAME = 0.5  # intersection over union from which two found objects of one class are one
MATCHED = 0.3  # intersection over union from which a found object is the true one


@dataclass(frozen=True)
class ObjectDetectorConfig:
    """Settings of the detector's training. World i shows the theme i modulo the number of themes.

    Attributes:
        pictures: Pictures of each world.
        batch: Pictures per update.
    """

    worlds: int = 300
    held_out_worlds: int = 30
    pictures: int = 4
    steps: int = 900
    batch: int = 16
    learning_rate: float = 3e-3
    width: int = 48
    seed: int = 0


@dataclass(frozen=True)
class DetectorQuality:
    """Share of the true objects that are found in held-out rendered pictures, and share of the
    found objects that are true."""

    recall: float
    precision: float


class ObjectDetector(nn.Module):
    """Predicts for each cell of 4x4 pixels the class of an object and the sides of its box."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GroupNorm(GROUPS, 32),
            nn.SiLU(),
            nn.Conv2d(32, width, 3, stride=2, padding=1),
        )
        # Dilated convolutions see the whole of a near object.
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(GROUPS, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            )
            for dilation in (1, 2, 4, 8, 2)
        )
        self.norm = nn.GroupNorm(GROUPS, width)
        self.head = nn.Conv2d(width, len(CLASSES) + 4, 1)
        with torch.no_grad():
            self.head.bias[: len(CLASSES)] = -3.0  # most cells show no object

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) in [-1, 1] to logits of the classes (B, 2, H / 4, W / 4) and
        logarithms of the distances, in cells, from a cell's centre to left, top, right and bottom,
        (B, 4, H / 4, W / 4)."""
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.silu(self.norm(x))).split((len(CLASSES), 4), dim=1)

    @torch.no_grad()
    def detect(self, pictures: Tensor) -> list[Boxes]:
        """Find objects in pictures, uint8 (B, H, W, 3): for each picture the surest first."""
        logits, distances = self(_images(pictures))
        probability = logits.sigmoid()
        x, y = _centres(*logits.shape[-2:])
        left, top, right, bottom = (STRIDE * distances.exp()).unbind(dim=1)
        corners = torch.stack([x - left, y - top, x + right, y + bottom], dim=-1)
        found = []
        for scores, places in zip(probability, corners):
            label, row, column = (scores > SURE).nonzero(as_tuple=True)
            order = scores[label, row, column].argsort(descending=True, stable=True)
            boxes = Boxes(places[row, column][order], label[order])
            found.append(_distinct(boxes))
        return found


def _images(pictures: Tensor) -> Tensor:
    """Turn pictures, uint8 (B, H, W, 3), into images (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _centres(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return x (columns) and y (rows, 1) of the centres of cells, in pixels."""
    x, y = (STRIDE * (torch.arange(count) + 0.5) for count in (columns, rows))
    return x, y[:, None]


def _distinct(boxes: Boxes) -> Boxes:
    """Keep the surest of boxes that show one object."""
    same = overlaps(boxes.corners, boxes.corners) > SAME
    same &= boxes.classes[:, None] == boxes.classes
    kept: list[int] = []
    for index in range(len(same)):
        if not same[index, kept].any():
            kept.append(index)
    return Boxes(boxes.corners[kept], boxes.classes[kept])


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Compute intersection over union of each pair of boxes: (n, 4), (m, 4) -> (n, m)."""
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(dim=-1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-9)


def count_found(true: Boxes, found: Boxes) -> int:
    """Count the true objects that are found: boxes of one class with an intersection over union of
    at least `MATCHED`. Each found object matches one true object, the best pairs first."""
    fit = overlaps(true.corners, found.corners)
    fit = fit.where(true.classes[:, None] == found.classes, 0)
    count = 0
    while fit.numel() and fit.max() >= MATCHED:
        row, column = divmod(int(fit.argmax()), fit.shape[1])
        fit[row], fit[:, column] = 0, 0
        count += 1
    return count


def targets(boxes: Boxes, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return what a detector shall say of a picture: classes (2, rows, columns) of 0 and 1, and
    logarithms of distances (4, rows, columns), 0 where no object is.

    The cells at the middle of a box say its object, at least one. A smaller box comes before a
    larger one.
    """
    x, y = _centres(rows, columns)
    classes, distances = torch.zeros(len(CLASSES), rows, columns), torch.zeros(4, rows, columns)
    area = (boxes.corners[:, 2:] - boxes.corners[:, :2]).prod(dim=-1)
    for index in area.argsort(descending=True).tolist():
        left, top, right, bottom = boxes.corners[index].tolist()
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        inside = (x - middle_x).abs() <= CENTRE * (right - left)
        inside = inside & ((y - middle_y).abs() <= CENTRE * (bottom - top))
        row, column = int(middle_y / STRIDE), int(middle_x / STRIDE)
        inside[min(row, rows - 1), min(column, columns - 1)] = True
        sides = torch.stack(torch.broadcast_tensors(x - left, y - top, right - x, bottom - y))
        distances = torch.where(inside, (sides / STRIDE).clamp(min=0.1).log(), distances)
        classes[:, inside] = 0
        classes[boxes.classes[index], inside] = 1
    return classes, distances


def render_pictures(
    seeds: Iterable[int], pictures: int, height: int, width: int
) -> tuple[Tensor, list[Boxes]]:
    """Render moments of random walks: uint8 (seeds * pictures, height, width, 3), and the boxes of
    each picture."""
    rendered, boxes = [], []
    for seed in seeds:
        world = make_world(seed, seed % len(THEMES))
        walk = (pictures - 1) * WALK_STEPS
        _, poses = sample_trajectory(world, walk, np.random.default_rng(seed))
        poses = poses[:: max(1, (len(poses) - 1) // max(1, pictures - 1))]
        rendered.append(render(world, poses, height, width))
        boxes.extend(object_boxes(world, pose, height, width) for pose in poses)
    return torch.cat(rendered), boxes


def augment(
    images: Tensor, classes: Tensor, distances: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror, blur and add noise, by another amount for each picture.

    images: (B, 3, H, W). classes, distances: `targets` of each. Returns all three, changed.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(images), 1, 1, 1), generator=random)

    mirrored = draw(0, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    classes = torch.where(mirrored, classes.flip(-1), classes)
    left, top, right, bottom = distances.flip(-1).unbind(dim=1)
    distances = torch.where(mirrored, torch.stack([right, top, left, bottom], dim=1), distances)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = images.lerp(blurred, draw(0, 1))
    noise = torch.randn(images.shape, generator=random)
    return images + draw(0, 0.06) * noise, classes, distances


def train_detector(
    config: ObjectDetectorConfig, height: int, width: int
) -> tuple[ObjectDetector, DetectorQuality]:
    """Train a detector for pictures of `height` x `width`; equal arguments give equal detectors."""
    random = torch.Generator().manual_seed(config.seed)
    seeds = range(FIRST_SEED, FIRST_SEED + config.worlds)
    pictures, boxes = render_pictures(seeds, config.pictures, height, width)
    grid = -(-height // STRIDE), -(-width // STRIDE)
    classes, distances = (torch.stack(part) for part in zip(*(targets(b, *grid) for b in boxes)))

    def loss(detector: ObjectDetector) -> Tensor:
        chosen = torch.randint(len(pictures), (config.batch,), generator=random)
        given = _images(pictures[chosen]), classes[chosen], distances[chosen]
        return _loss(detector, *augment(*given, random))

    detector = network_cache.train_network(lambda: ObjectDetector(config.width), config, loss)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + config.held_out_worlds)
    return detector, _quality(detector, *render_pictures(seeds, config.pictures, height, width))


def _loss(detector: ObjectDetector, images: Tensor, classes: Tensor, distances: Tensor) -> Tensor:
    """Return the error of classes in every cell and of boxes in cells with an object."""
    logits, predicted = detector(images)
    shown = classes.amax(dim=1, keepdim=True)
    count = shown.sum().clamp(min=1)
    wrong = F.binary_cross_entropy_with_logits(logits, classes, reduction="sum")
    away = F.smooth_l1_loss(predicted, distances, reduction="none", beta=0.1)
    return (wrong + (shown * away).sum()) / count


def _quality(detector: ObjectDetector, pictures: Tensor, boxes: Sequence[Boxes]) -> DetectorQuality:
    found = detector.detect(pictures)
    right = sum(map(count_found, boxes, found))
    true, said = (sum(len(each.classes) for each in both) for both in (boxes, found))
    return DetectorQuality(right / max(1, true), right / max(1, said))


def load_detector(
    folder: Path, config: ObjectDetectorConfig, height: int, width: int
) -> tuple[ObjectDetector, DetectorQuality]:
    """Read the detector from the cache `folder`, or train it and keep it there.

    The file is `object-detector-<hash>.safetensors`. The hash covers the configuration and a sample
    of pictures and boxes.
    """
    path = folder / f"object-detector-{_fingerprint(config, height, width)}.safetensors"

    def train() -> tuple[ObjectDetector, list[float]]:
        detector, quality = train_detector(config, height, width)
        return detector, [quality.recall, quality.precision]

    detector, quality = network_cache.read_or_train(
        path, "object detector", lambda: ObjectDetector(config.width), train, scores=2
    )
    return detector, DetectorQuality(*quality)


def _fingerprint(config: ObjectDetectorConfig, height: int, width: int) -> str:
    """Hash everything that the trained detector depends on."""
    settings = {**asdict(config), "height": height, "width": width}
    boxing = [truth.VISIBLE, truth.SMALLEST, CENTRE]
    digest = hashlib.sha256(json.dumps([settings, boxing], sort_keys=True).encode())
    pictures, boxes = render_pictures(range(FIRST_SEED, FIRST_SEED + len(THEMES)), 1, height, width)
    digest.update(pictures.numpy().tobytes())
    for each in boxes:
        digest.update(each.corners.numpy().tobytes())
    return digest.hexdigest()[:12]
