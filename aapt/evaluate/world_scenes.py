"""Held-out walks through the rendered world: a rendered truth, known themes, commanded motion."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from ..data.tiny_world.boxes import object_boxes
from ..data.tiny_world.render import render
from ..data.tiny_world.themes import THEMES
from ..data.tiny_world.world import FORWARD_STEP, YAW_STEP, World, make_world, sample_trajectory
from ..model.conditioning import control_rays, followed, relative_poses
from ..streaming.generator import StreamingGenerator
from ..vae.pixels import to_pixels, to_video
from . import metrics
from .kept_objects import SECONDS, measure_objects
from .motion_probe import MotionProbe, ProbeConfig, ProbeQuality, load_probe
from .object_detector import ObjectDetectorConfig, load_detector
from .scenes import AUTOENCODER, TRUTH, Timed
from .video_frames import VideoFrames, latent_statistics, precision
from .windows import Window

FIRST_SEED = 10_000_000  # of held-out worlds: far beyond those of training and of the motion probe
SEEDS_PER_EVALUATION = 1_000
THEME_SEED = 6_000_000  # of the worlds that give a theme its palette
THEME_WORLDS = 4
RENDERED_FRAMES = 24  # at once, of a whole video
DECODED_BEFORE = 6  # latent frames before a single picture of the autoencoder


@dataclass(frozen=True)
class Start:
    """A walk through a world that no training has seen.

    Attributes:
        controls: (T, 2), rows (yaw, forward).
        poses: (1 + 4 T, 3), one per video frame.
    """

    world: World
    prompt: str
    controls: Tensor
    poses: Tensor


def held_out_starts(count: int, steps: int, seed: int) -> list[Start]:
    """Make `count` walks of `steps` latent frames through the themes and their prompts, in turn.

    Walk i is the same for every count, and begins the same for every number of steps.
    """
    if not 1 <= count <= SEEDS_PER_EVALUATION:
        raise ValueError(f"starts: expected 1 to {SEEDS_PER_EVALUATION}, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    starts = []
    for index in range(count):
        world_seed = FIRST_SEED + SEEDS_PER_EVALUATION * seed + index
        turn, theme = divmod(index, len(THEMES))
        world = make_world(world_seed, theme)
        prompts = THEMES[theme].prompts
        walk = sample_trajectory(world, steps, np.random.default_rng(world_seed))
        starts.append(Start(world, prompts[turn % len(prompts)], *walk))
    return starts


def theme_frames(height: int, width: int) -> Tensor:
    """Render video frames from all over each theme: uint8 (themes, F, H, W, 3)."""
    themes = []
    for theme in range(len(THEMES)):
        frames = []
        for index in range(THEME_WORLDS):
            seed = THEME_SEED + index
            world = make_world(seed, theme)
            _, poses = sample_trajectory(world, 48, np.random.default_rng(seed))
            frames.append(render(world, poses[::24], height, width))
        themes.append(torch.cat(frames))
    return torch.stack(themes)


def render_truth(
    starts: Sequence[Start], frames: Sequence[int], height: int, width: int
) -> VideoFrames:
    """Render the video frames with these numbers of each walk."""
    chosen = list(frames)
    videos = [render(start.world, start.poses[chosen], height, width) for start in starts]
    return VideoFrames(chosen, torch.stack(videos))


@torch.inference_mode()
def reconstruct(
    generator: StreamingGenerator, truth: VideoFrames, windows: Sequence[Window]
) -> tuple[VideoFrames, list[Tensor]]:
    """Encode the truth and decode it again, each window as a clip of its own.

    Returns the decoded video frames, and the `latent_statistics` (starts, T, 2) of each window
    without its first latent frame, which holds one video frame alone.
    """
    numbers, pixels, statistics = [], [], []
    for window in windows:
        clips = [to_video(clip[None]) for clip in truth[window.frames]]
        encoded = [generator.vae.encode(clip.to(generator.vae.latent_mean)) for clip in clips]
        with precision(generator.device):
            decoded = [to_pixels(generator.vae.decode(latent)) for latent in encoded]
        numbers.extend(window.frames)
        pixels.append(torch.cat(decoded))
        statistics.append(latent_statistics(torch.cat(encoded)[:, :, 1:]).cpu())
    return VideoFrames(numbers, torch.cat(pixels, dim=1)), statistics


class WorldScenes:
    """`Scenes` of the rendered world, for checkpoints that move as it does.

    generators: by their checkpoints, all of one image size. probe, cache: see `load_probe`.
    detector: see `load_detector`. ValueError for a checkpoint whose controls have another meaning.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        generators: Mapping[str | Path, StreamingGenerator],
        probe: ProbeConfig,
        cache: Path,
        detector: ObjectDetectorConfig,
    ):
        for checkpoint, generator in generators.items():
            _check_moves(checkpoint, generator)
        self.starts, self.prompts = starts, [start.prompt for start in starts]
        self.labels = [f"{i} {THEMES[s.world.theme].name}" for i, s in enumerate(starts)]
        self.controls = torch.stack([start.controls for start in starts])
        self.themes = torch.tensor([start.world.theme for start in starts])
        self.steps = self.controls.shape[1]
        self.height, self.width = generator.height, generator.width
        self.camera = generator.model.camera
        self._probe, self._detector = (cache, probe), (cache, detector)

    @cached_property
    def probe(self) -> tuple[MotionProbe, ProbeQuality]:
        """The motion probe, read from the cache or trained, and its quality."""
        return load_probe(*self._probe, self.height, self.width)

    @cached_property
    def references(self) -> Tensor:
        """Palettes (themes, 6) of the themes."""
        return metrics.palette(theme_frames(self.height, self.width))

    def truth(
        self,
        generator: StreamingGenerator,
        frames: Sequence[int],
        windows: Sequence[Window],
        timed: Timed,
    ) -> tuple[dict[str, VideoFrames], list[Tensor]]:
        with timed("motion probe"):
            _ = self.probe  # trained now unless the cache holds it
        with timed(TRUTH):
            truth = render_truth(self.starts, frames, self.height, self.width)
        with timed(AUTOENCODER):
            through, statistics = reconstruct(generator, truth, windows)
        return {TRUTH: truth, AUTOENCODER: through}, statistics

    def truth_video(
        self, generator: StreamingGenerator, start: int, steps: int
    ) -> Iterator[Tensor]:
        walk = self.starts[start]
        for poses in walk.poses[: 1 + FRAMES_PER_LATENT * steps].split(RENDERED_FRAMES):
            yield render(walk.world, poses, self.height, self.width)

    def first_latents(self, generator: StreamingGenerator) -> Tensor:
        pixels = render_truth(self.starts, [0], self.height, self.width).pixels
        return generator.vae.encode(to_video(pixels).to(generator.vae.latent_mean))

    def condition(self, generator: StreamingGenerator) -> Callable[[int], Tensor]:
        controls, camera = self.controls.to(generator.device), generator.model.camera

        def rays(step: int) -> Tensor:
            begun = 0 if camera.relative_to_first else step - 1
            made = control_rays(controls[:, begun:step], camera, *generator.latent_size)
            return made[:, :, -1:]

        return rays

    def control_metrics(self, video: Tensor, palettes: Tensor, window: Window) -> Mapping[str, Any]:
        probe, _ = self.probe
        motion = torch.stack([probe.estimate(clip) for clip in video])
        controls = self.controls[:, window.first - 1 : window.last]
        yaw, forward = ((motion[..., axis], controls[..., axis]) for axis in (0, 1))
        steps = {
            name: metrics.response_steps(*way) for name, way in (("yaw", yaw), ("forward", forward))
        }
        return {
            "theme_kept": metrics.theme_kept(palettes, self.references, self.themes),
            "yaw_correlation": metrics.correlation(*yaw),
            "forward_correlation": metrics.correlation(*forward),
            "yaw_gain": metrics.gain(*yaw),
            "forward_gain": metrics.gain(*forward),
            **{
                f"{name}_response": None if lag is None else FRAMES_PER_LATENT * lag
                for name, lag in steps.items()
            },
        }

    def cameras(self, window: Window) -> Tensor:
        held = self.controls[:, window.first - 1 : window.last]
        each_frame = held.repeat_interleave(FRAMES_PER_LATENT, dim=1)
        return followed(relative_poses(each_frame, self.camera))

    def object_fields(
        self, generator: StreamingGenerator, videos: Mapping[str, VideoFrames], timed: Timed
    ) -> Mapping[str, Any]:
        with timed("object detector"):
            detector, quality = load_detector(*self._detector, self.height, self.width)
        objects = {}
        with timed("objects"):
            for second in SECONDS:
                frame = generator.fps * second
                if frame not in videos[TRUTH].numbers:
                    continue
                last = math.ceil(frame / FRAMES_PER_LATENT)
                window = Window(f"{second} s", max(1, last - DECODED_BEFORE), last)
                truth = render_truth(self.starts, window.frames, self.height, self.width)
                through, _ = reconstruct(generator, truth, [window])
                sources = {**videos, AUTOENCODER: through}
                boxes = [
                    object_boxes(start.world, start.poses[frame], self.height, self.width)
                    for start in self.starts
                ]
                pictures = {name: video[[frame]][:, 0] for name, video in sources.items()}
                objects[window.name] = measure_objects(detector, boxes, pictures)
        return {"objects": objects, "object_detector": quality}

    def report_fields(self, truth: VideoFrames, window: Window) -> Mapping[str, Any]:
        palettes = metrics.palette(truth[window.frames])
        return {
            "truth": "rendered",
            "same_theme": metrics.palette_distance(palettes, self.themes, same_theme=True),
            "other_theme": metrics.palette_distance(palettes, self.themes, same_theme=False),
            "probe": self.probe[1],
        }


def _check_moves(checkpoint: str | Path, generator: StreamingGenerator) -> None:
    """Raise ValueError unless a checkpoint's controls mean what the world's do."""
    camera = generator.model.camera
    if camera is None:
        raise ValueError(
            f"{checkpoint}: expected a model with a camera, to walk as the world does, got one "
            "without; other models are measured on encoded clips, pass --latents FOLDER"
        )
    expected = (YAW_STEP, FORWARD_STEP, FRAMES_PER_LATENT)
    got = (camera.yaw_step, camera.forward_step, generator.frames_per_step)
    if got != expected:
        raise ValueError(
            f"{checkpoint}: expected the world's yaw step, forward step and frames per step "
            f"{expected}, got {got}; other models are measured on encoded clips, pass --latents "
            "FOLDER"
        )
