"""Clips cut out of a sample, with their captions and their motion."""

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
    """Settings by which clips are cut.

    Attributes:
        buckets: Families of sizes. A clip is cut in the sizes of one family, see `choose`.
        latent_frames: Latent frames of a clip, without the first frame.
        stride: Video frames from the start of a clip to the start of the next clip.
        fps: Video frames per second.
        frames_per_latent: Video frames per latent frame.
        motion: Kind of motion that is read from sidecars.
        max_move: Largest move of the camera per video frame, in units of the trajectory; a larger
            one is a mistake of the trajectory.
        max_turn: Largest turn of the camera per video frame, in radians.
        min_score: Score from which keypoints are drawn.
    """

    buckets: tuple[tuple[Bucket, ...], ...]
    latent_frames: int
    stride: int
    fps: int = 24
    frames_per_latent: int = 4
    motion: Literal["none", "camera", "pose"] = "none"
    max_move: float = 0.5
    max_turn: float = math.radians(15)
    min_score: float = 0.3

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
        """Video frames of a clip."""
        return 1 + self.frames_per_latent * self.latent_frames

    @property
    def seconds(self) -> float:
        """Seconds from the first video frame of a clip to the last."""
        return (self.frames - 1) / self.fps


@dataclass(frozen=True)
class RawClip:
    """A clip in one size.

    Attributes:
        video: uint8 (F, H, W, 3).
        bucket: (W, H).
        source: Name of the sample.
        start: Seconds after the first picture of the file.
        captions: Descriptions of the sample.
        poses: With camera motion (T, frames_per_latent, 4, 4), each relative to the video frame
            before.
        lens: With camera motion (4,) of (fx, fy, cx, cy), fractions of the clip's sides.
        skeletons: With pose motion, drawings like `video`.
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
    """A video frame at the even rate, and the picture of the file that it shows."""

    time: float  # seconds
    shown: float  # seconds, of the picture
    index: int  # number of the picture
    pixels: list[np.ndarray]  # one array per size


def read_clips(sample: Sample, config: CutConfig) -> Iterator[RawClip | Skipped]:
    """Read the clips of a sample in order of time, and the reasons to skip the sample or a clip.

    OSError if the disk fails; every other error is a reason to skip.
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
        # A frame may be half a frame outside, because its nearest picture is an end.
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
    """The clips of the frames in `source`, cropped and resized to every size.

    A clip starts every `stride` frames of a take. Of several gaps with no clip between them, the
    first is a reason to skip.
    """
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
    """One clip in every size, with its motion. Skipped if the motion cannot be used."""
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
    """Poses at the times of the pictures that are shown.

    The times of the frames would be wrong: 30 fps shown at 24 is uneven, and the camera must move
    as unevenly as the pictures do.
    """
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
    """Drawings of the people in the pictures that are shown."""
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
