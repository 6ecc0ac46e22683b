"""Held-out puppets: a rendered truth, commanded keypoints, known looks and places."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from ..data.tiny_puppet.clips import Puppet, sample_puppet
from ..data.tiny_puppet.looks import LOOKS
from ..data.tiny_puppet.render import PLACES, backdrop
from ..model.pose import POINTS, draw_skeletons
from ..streaming.generator import StreamingGenerator
from ..vae.pixels import to_video
from . import metrics
from .keypoints import KeypointDetector, KeypointDetectorConfig, keypoint_distance, load_detector
from .scenes import AUTOENCODER, TRUTH, Timed
from .video_frames import VideoFrames
from .windows import Window
from .world_scenes import RENDERED_FRAMES, reconstruct

FIRST_SEED = 12_000_000  # of held-out puppets: far beyond those of training and of the detector
SEEDS_PER_EVALUATION = 1_000
REFERENCE_SEED = 8_000_000  # of the figures and places that give looks and places their colours
REFERENCES = 4
BODY = tuple(  # pairs of points whose middles show the colours of a look
    (POINTS.index(a), POINTS.index(b))
    for a, b in (
        ("neck", "left hip"),
        ("neck", "right hip"),
        ("left elbow", "left wrist"),
        ("right elbow", "right wrist"),
        ("left hip", "left knee"),
        ("right hip", "right knee"),
        ("head", "head"),
    )
)


def held_out_puppets(count: int, steps: int, seed: int, height: int, width: int) -> list[Puppet]:
    """Draw `count` puppets that move for `steps` latent frames after the first; six show every look
    and every place.

    Puppet i is the same for every count, and begins the same for every number of steps.
    """
    if not 1 <= count <= SEEDS_PER_EVALUATION:
        raise ValueError(f"starts: expected 1 to {SEEDS_PER_EVALUATION}, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    first = FIRST_SEED + SEEDS_PER_EVALUATION * seed
    return [
        sample_puppet(
            first + index,
            1 + steps,
            look=index % len(LOOKS),
            place=(index + index // len(LOOKS)) % len(PLACES),
            height=height,
            width=width,
        )
        for index in range(count)
    ]


def body_colours(video: Tensor, points: Tensor) -> Tensor:
    """Compute the mean colours (starts, 7, 3) at the middles of a figure's parts, 0 to 1.

    video: uint8 (starts, F, H, W, 3). points: (starts, F, 14, 2) in shares of width and height.
    """
    height, width = video.shape[2:4]
    ends = points[:, :, BODY].mean(dim=3)  # (starts, F, 7, 2)
    column = (ends[..., 0] * width).long().clamp(0, width - 1)
    row = (ends[..., 1] * height).long().clamp(0, height - 1)
    start = torch.arange(len(video))[:, None, None]
    frame = torch.arange(video.shape[1])[None, :, None]
    return (video[start, frame, row, column].double() / 255).mean(dim=1)


def look_kept(colours: Tensor, references: Tensor, looks: Tensor) -> float:
    """Compute the share of starts whose colours are nearest to their own look's reference.

    colours: (starts, 7, 3). references: (looks, 7, 3). looks: (starts,).
    """
    errors = (colours[:, None] - references[None]).abs().mean(dim=(-2, -1))
    return (errors.argmin(dim=1) == looks).double().mean().item()


class PuppetScenes:
    """`Scenes` of held-out puppets, for checkpoints that follow poses.

    generators: by their checkpoints, all of one image size. detector, cache: see `load_detector`.
    ValueError for a checkpoint that follows no poses.
    """

    def __init__(
        self,
        puppets: Sequence[Puppet],
        generators: Mapping[str | Path, StreamingGenerator],
        detector: KeypointDetectorConfig,
        cache: Path,
    ):
        for checkpoint, generator in generators.items():
            if not generator.poses:
                raise ValueError(
                    f"{checkpoint}: expected a model that follows poses, as the others do, got one "
                    "that does not; measure it in an evaluation of its own"
                )
        self.puppets, self.prompts = puppets, [puppet.prompt for puppet in puppets]
        self.labels = [f"{i} {puppet.prompt}" for i, puppet in enumerate(puppets)]
        self.points = torch.from_numpy(np.stack([puppet.points for puppet in puppets]))
        self.steps = (self.points.shape[1] - 1) // FRAMES_PER_LATENT
        self.looks = torch.tensor([puppet.look for puppet in puppets])
        self.places = torch.tensor([puppet.place for puppet in puppets])
        self.height, self.width = generator.height, generator.width
        self._detector = cache, detector

    @cached_property
    def detector(self) -> tuple[KeypointDetector, float]:
        """The keypoint detector, read from the cache or trained, and its own AKD."""
        return load_detector(*self._detector, self.height, self.width)

    @cached_property
    def references(self) -> tuple[Tensor, Tensor]:
        """Colours (looks, 7, 3) of the looks, and palettes (places, 6) of the places."""
        size = {"height": self.height, "width": self.width}
        looks, places = [], []
        for look in range(len(LOOKS)):
            figures = [
                sample_puppet(REFERENCE_SEED + number, 13, look=look, **size)
                for number in range(REFERENCES)
            ]
            video = torch.stack([figure.render() for figure in figures])
            points = torch.from_numpy(np.stack([figure.points[..., :2] for figure in figures]))
            looks.append(body_colours(video, points).mean(dim=0))
        for place in range(len(PLACES)):
            seeds = range(REFERENCE_SEED, REFERENCE_SEED + REFERENCES)
            views = [backdrop(seed, place, self.height, self.width) for seed in seeds]
            places.append(torch.from_numpy(np.stack(views)).round().to(torch.uint8))
        return torch.stack(looks), metrics.palette(torch.stack(places))

    def truth(
        self,
        generator: StreamingGenerator,
        frames: Sequence[int],
        windows: Sequence[Window],
        timed: Timed,
    ) -> tuple[dict[str, VideoFrames], list[Tensor]]:
        with timed("keypoint detector"):
            _ = self.detector  # trained now unless the cache holds it
        with timed(TRUTH):
            chosen = list(frames)
            videos = torch.stack([puppet.render(chosen) for puppet in self.puppets])
            truth = VideoFrames(chosen, videos)
        with timed(AUTOENCODER):
            through, statistics = reconstruct(generator, truth, windows)
        return {TRUTH: truth, AUTOENCODER: through}, statistics

    def truth_video(
        self, generator: StreamingGenerator, start: int, steps: int
    ) -> Iterator[Tensor]:
        frames = range(min(len(self.points[start]), 1 + FRAMES_PER_LATENT * steps))
        for first in frames[::RENDERED_FRAMES]:
            yield self.puppets[start].render(frames[first : first + RENDERED_FRAMES])

    def first_latents(self, generator: StreamingGenerator) -> Tensor:
        pixels = torch.stack([puppet.render([0]) for puppet in self.puppets])
        return generator.vae.encode(to_video(pixels).to(generator.vae.latent_mean))

    @torch.inference_mode()
    def condition(self, generator: StreamingGenerator) -> Callable[[int], Tensor]:
        channels = torch.cat(
            [
                generator.encode(draw_skeletons(puppet.points, self.height, self.width))[None]
                for puppet in self.puppets
            ]
        )
        return lambda step: channels[:, :, step : step + 1]

    def control_metrics(self, video: Tensor, palettes: Tensor, window: Window) -> Mapping[str, Any]:
        shown, (looks, places) = video[:, 1:], self.references
        commanded = self.points[:, list(window.frames)[1:], :, :2]
        found = self.detector[0].find(shown)
        return {
            "akd_to_pose": keypoint_distance(found, commanded, self.height, self.width),
            "look_kept": look_kept(body_colours(shown, found), looks, self.looks),
            "theme_kept": metrics.theme_kept(palettes, places, self.places),
        }

    def cameras(self, window: Window) -> None:
        return None

    def object_fields(
        self, generator: StreamingGenerator, videos: Mapping[str, VideoFrames], timed: Timed
    ) -> Mapping[str, Any]:
        return {}

    def report_fields(self, truth: VideoFrames, window: Window) -> Mapping[str, Any]:
        palettes = metrics.palette(truth[window.frames])
        return {
            "truth": "rendered",
            "same_theme": metrics.palette_distance(palettes, self.places, same_theme=True),
            "other_theme": metrics.palette_distance(palettes, self.places, same_theme=False),
            "detector_distance": self.detector[1],
        }
