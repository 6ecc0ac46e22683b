"""Folders of encoded clips, which `aapt encode` writes and training reads.

index.json            settings, the shards of each bucket, and counts of skips by reason
config.json           with vae.safetensors: the autoencoder of the latents (`aapt.vae.folder`)
videos.jsonl          one line per video: its clips, its skips, and stamps of its files
736x416/00000.safetensors
    latents  (clips, C, 1 + T, h, w) float16, of unit deviation
    poses    (clips, T, 4, 4, 4) and lens (clips, 4), with camera motion
    skeletons  (clips, C, T, h, w) float16, with pose motion: the latents of the drawings
    text  (rows, width), with a text encoder: the embeddings of all captions of the shard and of the
        empty prompt, one after another; text_ends (captions,): their ends; see `stored_text`
    metadata "clips": JSON, per clip its video, start and captions; "texts": the captions of `text`
"""

import bisect
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..model.conditioning import through_lens
from ..model.config import CameraConfig
from .clips import ClipBatch, FirstFrame, window_starts
from .randomness import ClipRandom

FORMAT_VERSION = 1
INDEX = "index.json"


class DataError(ValueError):
    """A reason why encoded clips cannot be used."""


def read_index(folder: Path) -> dict[str, Any]:
    """Read `index.json` of a folder of encoded clips. DataError if it is missing or not valid."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: expected a folder of encoded clips with {INDEX}, got none; make one with "
            "aapt encode"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}") from None
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: expected format_version {FORMAT_VERSION}, got {version}")
    return index


def ray_deviation(shards: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Deviation of ray origins and of ray directions (`docs/method.md#10`) over all clips.

    shards: entries of `index.json`. The rays are seen at MEASURED_FIELD_OF_VIEW. None without
    camera motion.
    """
    known = [shard for shard in shards if "ray_squares" in shard]
    if not known:
        return None
    squares = torch.tensor([shard["ray_squares"] for shard in known], dtype=torch.float64)
    weights = torch.tensor([shard["clips"] for shard in known], dtype=torch.float64)
    origin, direction = (weights @ squares / weights.sum()).sqrt().tolist()
    return origin, direction


class LatentShards:
    """The clips of one bucket of a folder, read from the disk when they are drawn.

    Args:
        folder: A folder of `aapt encode`.
        bucket: A size such as '736x416'; None for the only bucket of the folder.
        camera: The model's camera, to whose lens the clips' own lenses are brought. Needed for
            clips with camera motion, and for no others.

    Raises DataError if the folder, the bucket or a shard is missing or damaged.
    """

    def __init__(
        self, folder: str | Path, bucket: str | None = None, camera: CameraConfig | None = None
    ):
        self.folder, self.camera = Path(folder), camera
        index = read_index(self.folder)
        buckets, self.encoding = index["buckets"], index["encoding"]
        if bucket is None and len(buckets) == 1:
            bucket = next(iter(buckets))
        if bucket not in buckets:
            raise DataError(
                f"bucket: expected one of {', '.join(buckets) or 'none yet'} in {folder}, "
                f"got {bucket}"
            )
        if self.encoding["motion"] == "camera" and camera is None:
            raise ValueError(f"camera: expected a CameraConfig for the trajectories of {folder}")
        if camera is not None and camera.relative_to_first:
            raise ValueError(
                "relative_to_first: expected False, because a clip's lens is folded into poses "
                "relative to the frame before, got True"
            )
        if camera is not None and self.encoding["motion"] != "camera":
            raise DataError(
                f"{folder}: expected clips with camera motion, got {self.encoding['motion']}"
            )
        self.bucket = bucket
        self.shards = buckets[bucket]["shards"]
        self.ends = list(itertools.accumulate(shard["clips"] for shard in self.shards))
        for shard in self.shards:
            path = self.folder / shard["file"]
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            if size != shard["bytes"]:
                raise DataError(f"{path}: expected {shard['bytes']} bytes, got {size}")
        self._open = functools.lru_cache(maxsize=64)(self._read_shard)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip, without the first frame."""
        return self.encoding["latent_frames"]

    def part(self, random: ClipRandom, frames: int) -> "LatentShards":
        return self

    def sample(
        self, random: ClipRandom, frames: int, first_frame: FirstFrame = "half"
    ) -> ClipBatch:
        clips = random.integers(len(self))
        starts = window_starts(random, 1 + self.latent_frames, frames, first_frame)
        choices = random.uniform().tolist()
        windows = [
            self._window(clip, start, frames, choice)
            for clip, start, choice in zip(clips, starts, choices)
        ]
        return self._batch(windows, list(zip(clips, starts)), random.device)

    def motion(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self._whole_motion(number) for number in numbers])

    def whole(self, clips: Sequence[int]) -> ClipBatch:
        """Whole clips by their numbers, each with its first caption."""
        windows = [self._window(clip, 0, self.latent_frames, 0.0) for clip in clips]
        return self._batch(windows, [(clip, 0) for clip in clips], torch.device("cpu"))

    @staticmethod
    def _batch(
        windows: Sequence[tuple[Tensor, Tensor | None, str]],
        places: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> ClipBatch:
        latents, motion, prompts = zip(*windows)
        moved = None if motion[0] is None else torch.stack(motion).to(device)
        return ClipBatch(torch.stack(latents).to(device), moved, prompts, places)

    def _window(
        self, clip: int, start: int, frames: int, choice: float
    ) -> tuple[Tensor, Tensor | None, str]:
        """Latents (C, 1 + `frames`, h, w), motion and caption of one window.

        choice: number in [0, 1) that picks one of the clip's captions.
        """
        with self._shard_of(clip) as (shard, place, facts):
            latents = shard.get_slice("latents")[place, :, start : start + frames + 1].float()
            motion = self._read_motion(shard, place, start, frames)
            captions = facts["captions"]
            return latents, motion, captions[int(choice * len(captions))]

    def _whole_motion(self, clip: int) -> Tensor:
        with self._shard_of(clip) as (shard, place, _):
            return self._read_motion(shard, place, 0, self.latent_frames)

    def poses(self, clips: Sequence[int]) -> Tensor | None:
        """Read the pose of each video frame of whole clips, relative to the frame before, through
        the clips' own lenses: (clips, T, frames, 4, 4); None without camera motion."""
        if self.encoding["motion"] != "camera":
            return None
        poses = []
        for clip in clips:
            with self._shard_of(clip) as (shard, place, _):
                poses.append(shard.get_slice("poses")[place, : self.latent_frames])
        return torch.stack(poses)

    def _read_motion(self, shard, place: int, start: int, frames: int) -> Tensor | None:
        if self.encoding["motion"] == "camera":
            poses = shard.get_slice("poses")[place, start : start + frames]
            lens = shard.get_slice("lens")[place]
            size = shard.get_slice("latents").get_shape()[-2:]
            return through_lens(poses, lens, self.camera, *size)
        if self.encoding["motion"] == "pose":
            return shard.get_slice("skeletons")[place, :, start : start + frames].float()
        return None

    @contextmanager
    def _shard_of(self, clip: int) -> Iterator[tuple]:
        """The open shard of a clip, the clip's place in it, and the facts recorded of the clip.

        What fails inside is a DataError.
        """
        number = bisect.bisect_right(self.ends, clip)
        place = clip - (self.ends[number - 1] if number else 0)
        path = self.folder / self.shards[number]["file"]
        try:
            shard, clips = self._open(path)
            yield shard, place, clips[place]
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            raise DataError(f"{path}: expected a whole shard of clips: {error}") from None

    @staticmethod
    def _read_shard(path: Path):
        shard = safe_open(path, framework="pt")
        return shard, json.loads(shard.metadata()["clips"])


class Mixture:
    """Clips of several folders or buckets as one set, of any sizes and lengths.

    An update draws all its clips from one part, because a batch has one size. The part is drawn
    among those whose clips are long enough, in proportion to its number of clips. An update that
    draws several times draws from `part`.
    """

    def __init__(self, parts: Sequence[LatentShards]):
        self.parts = parts

    @property
    def latent_frames(self) -> int:
        """Latent frames of the longest clips, without the first frame."""
        return max(part.latent_frames for part in self.parts)

    def part(self, random: ClipRandom, frames: int) -> LatentShards:
        """The part that the update draws from, see `Clips.part`. ValueError if all are shorter."""
        fitting = [part for part in self.parts if part.latent_frames >= frames]
        if not fitting:
            raise ValueError(
                f"frames: expected at most {self.latent_frames} after the first, as the longest "
                f"clips have, got {frames}"
            )
        clips = sum(map(len, fitting))
        # Seeded like the update's shared numbers, but apart: each draw would change these.
        update = random.shared.bit_generator.seed_seq.entropy
        chosen = np.random.default_rng([*update, 2])
        return fitting[chosen.choice(len(fitting), p=[len(part) / clips for part in fitting])]

    def sample(
        self, random: ClipRandom, frames: int, first_frame: FirstFrame = "half"
    ) -> ClipBatch:
        needed = frames + 1 if first_frame == "never" else frames
        return self.part(random, needed).sample(random, frames, first_frame)
