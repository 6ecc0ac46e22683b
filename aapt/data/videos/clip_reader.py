"""From a sample to the clips cut out of it, with their captions and their motion."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...model.conditioning import trajectory_poses
from .buckets import Bucket, Crop, choose, crop
from .keypoints import POINTS, People, parse_keypoints
from .picture import Picture
from .sample import Sample, Skipped
from .skeletons import draw_skeletons
from .trajectories import Trajectory, parse_trajectory, rotation_vectors
from .video_reader import at_rate, file_errors, pictures


@dataclass(frozen=True)
class CutConfig:
    """How clips are cut: of 1 + `frames_per_latent` * `latent_frames` frames at `fps`, a start
    every `stride` frames, in all sizes of the family of buckets that crops least."""

    buckets: tuple[tuple[Bucket, ...], ...]
    latent_frames: int
    stride: int
    fps: int = 24
    frames_per_latent: int = 4
    motion: Literal["none", "camera", "pose"] = "none"
    max_move: float = 0.5  # trajectory's units per frame; further is a mistake in it (SPEC 10)
    max_turn: float = math.radians(15)  # per frame
    min_score: float = 0.3  # of a keypoint that is drawn

    def __post_init__(self):
        for name in ("latent_frames", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        sizes = [bucket for family in self.buckets for bucket in family]
        if not sizes or not all(self.buckets):
            raise ValueError("buckets: expected one or more, got none")
        for bucket in sizes:
            if sizes.count(bucket) > 1:
                raise ValueError(f"buckets: expected each once, got {bucket} again")
        if self.motion not in ("none", "camera", "pose"):
            raise ValueError(f"motion: expected none, camera or pose, got {self.motion!r}")

    @property
    def frames(self) -> int:
        return 1 + self.frames_per_latent * self.latent_frames

    @property
    def seconds(self) -> float:
        """From the first frame of a clip to its last."""
        return (self.frames - 1) / self.fps


@dataclass(frozen=True)
class RawClip:
    """video: uint8 (F, H, W, 3); `start` in seconds after the video's first picture.

    With camera motion, poses (T, frames_per_latent, 4, 4), each relative to the frame before, and
    the lens (4,) in shares of the clip's size; with pose motion, skeletons like the video.
    """

    video: np.ndarray
    bucket: Bucket
    source: str
    start: float
    captions: list[str]
    poses: Tensor | None = None
    lens: Tensor | None = None
    skeletons: np.ndarray | None = None


class _Frame(NamedTuple):
    time: float
    shown: float  # the time of the picture shown
    index: int  # of that picture
    pixels: list[np.ndarray]  # in every size


def read_clips(sample: Sample, config: CutConfig) -> Iterator[RawClip | Skipped]:
    """Clips in order of time, and what could not be used: of the sample or of one clip.

    Only an OSError of the source's disk gets out: all that follows would fail with it.
    """
    try:
        with file_errors():
            yield from _read(sample, config)
    except Skipped as skipped:
        yield skipped


def _read(sample: Sample, config: CutConfig) -> Iterator[RawClip | Skipped]:
    if sample.fault:
        raise Skipped(*sample.fault)
    captions = sample.captions()
    trajectory = keypoints = None
    start, end = 0.0, math.inf
    if config.motion == "camera":
        blob = sample.sidecar("camera.txt", "no camera")
        trajectory = parse_trajectory(blob.text("bad camera"))
        # Half a frame outside is still the nearest picture to an end.
        start = max(0.0, trajectory.times[0].item())
        end = trajectory.times[-1].item() + 0.5 / config.fps
    elif config.motion == "pose":
        keypoints = parse_keypoints(sample.keypoints())
    with sample.open() as file:
        for window in _windows(at_rate(pictures(file), config.fps, start, end), config):
            if isinstance(window, Skipped):
                yield window
                continue
            try:
                yield from _clips(sample, captions, *window, trajectory, keypoints, config)
            except Skipped as skipped:
                yield skipped


def _windows(
    source: Iterator[tuple[float, Picture]], config: CutConfig
) -> Iterator[tuple[list[Crop], list[_Frame]] | Skipped]:
    """Every `stride` frames of a take the next `config.frames` of them, cropped and resized to
    every size. Of gaps with no window between them the first is told."""
    parts: list[Crop] = []
    window: deque[_Frame] = deque(maxlen=config.frames)
    count, take, gap, found = 0, 0, None, False
    for time, picture in source:
        if not parts:
            buckets = choose(config.buckets, *picture.size, picture.pixel_aspect)
            parts = [crop(*picture.size, bucket, picture.pixel_aspect) for bucket in buckets]
        elif picture.size != parts[0].source:
            raise Skipped(
                "size changes", f"at {time:.3f} s from {parts[0].source} to {picture.size}"
            )
        if picture.take != take:
            if window:
                shown = window[-1].shown
                gap = gap or Skipped("gap", f"from {shown:.3f} s to {picture.time:.3f} s")
            window.clear()
            count, take = 0, picture.take
        if window and window[-1].index == picture.index:
            pixels = window[-1].pixels
        else:
            pixels = [part.window(picture.pixels(*part.scaled)) for part in parts]
        window.append(_Frame(time, picture.time, picture.index, pixels))
        count += 1
        if count >= config.frames and (count - config.frames) % config.stride == 0:
            if gap:
                yield gap
                gap = None
            found = True
            yield parts, list(window)
    if gap:
        yield gap
    elif not found:
        raise Skipped(
            "too short", f"expected {config.frames} frames at {config.fps} fps, got {count}"
        )


def _clips(
    sample: Sample,
    captions: list[str],
    parts: list[Crop],
    frames: list[_Frame],
    trajectory: Trajectory | None,
    keypoints: list[People] | None,
    config: CutConfig,
) -> Iterator[RawClip]:
    """One window in every size. Skipped where it cannot be used."""
    start = frames[0].time
    motion = {}
    if trajectory is not None:
        motion["poses"] = _poses(frames, trajectory, config)
    for size, part in enumerate(parts):
        if trajectory is not None:
            motion["lens"] = torch.from_numpy(part.lens(trajectory.lens.numpy())).float()
        if keypoints is not None:
            motion["skeletons"] = _skeletons(frames, keypoints, part, config)
        video = np.stack([frame.pixels[size] for frame in frames])
        yield RawClip(video, part.bucket, sample.name, start, captions, **motion)


def _poses(frames: list[_Frame], trajectory: Trajectory, config: CutConfig) -> Tensor:
    """At the times of the pictures that are shown, not of the frames: 30 fps shown at 24 is uneven,
    and the camera moves as it is seen to move."""
    times = torch.tensor([frame.shown for frame in frames], dtype=torch.float64)
    poses = trajectory_poses(trajectory.at(times))
    move = poses[:, :3, 3].norm(dim=1).max().item()
    turn = rotation_vectors(poses[:, :3, :3]).norm(dim=1).max().item()
    if move > config.max_move or turn > config.max_turn:
        raise Skipped(
            "camera too fast",
            f"clip at {frames[0].time:.3f} s: expected moves up to {config.max_move:g} and turns "
            f"up to {math.degrees(config.max_turn):g} degrees a frame, got {move:.3g} and "
            f"{math.degrees(turn):.3g}",
        )
    return poses.float().unflatten(0, (-1, config.frames_per_latent))


def _skeletons(
    frames: list[_Frame], keypoints: list[People], part: Crop, config: CutConfig
) -> np.ndarray:
    drawn = []
    for frame in frames:
        people = np.zeros((0, POINTS, 3))
        if frame.index < len(keypoints):
            people = keypoints[frame.index].on(*part.source).copy()
        people[..., :2] = part.points(people[..., :2])
        drawn.append(draw_skeletons(people, *part.bucket, config.min_score))
    if not any(image.any() for image in drawn):
        raise Skipped("nobody", f"clip at {frames[0].time:.3f} s: no keypoint to draw")
    return np.stack(drawn)
