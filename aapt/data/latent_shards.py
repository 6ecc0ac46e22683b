"""Folders of encoded clips, as `aapt encode` writes them and training reads them.

index.json            what was encoded and how, the shards of each bucket, what was skipped
config.json           with vae.safetensors, the autoencoder that decodes them (`vae_folder`)
videos.jsonl          one line per video: its clips, and each reason to skip something of it
736x416/00000.safetensors
    latents  (clips, C, 1 + T, h, w) float16, of unit deviation
    poses    (clips, T, 4, 4, 4) and lens (clips, 4), with camera motion
    skeletons  (clips, C, T, h, w) float16, with pose motion: the latents of the drawings
    metadata "clips": JSON, per clip its video, start and captions
"""

import bisect
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
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
    """Encoded clips that cannot be used, and why."""


def read_index(folder: Path) -> dict[str, Any]:
    """`index.json` of a folder of encoded clips. DataError if there is none that fits."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder}: expected a folder of encoded clips with {INDEX}") from None
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}") from None
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: expected format_version {FORMAT_VERSION}, got {version}")
    return index


def ray_deviation(shards: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Of ray origins and directions (SPEC 10) over all clips of shards as `index.json` has them,
    seen at MEASURED_FIELD_OF_VIEW; None without camera motion."""
    known = [shard for shard in shards if "ray_squares" in shard]
    if not known:
        return None
    squares = torch.tensor([shard["ray_squares"] for shard in known], dtype=torch.float64)
    weights = torch.tensor([shard["clips"] for shard in known], dtype=torch.float64)
    origin, direction = (weights @ squares / weights.sum()).sqrt().tolist()
    return origin, direction


class LatentShards:
    """The clips of one bucket of a folder, read from the disk as they are drawn.

    bucket: such as '736x416'; not needed where the folder has one. camera: the model's, which
    brings clips of any lens to its own; needed for clips with camera motion, unused otherwise.
    Raises DataError for a folder, a bucket or a shard that is not as it should be.
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
        if camera is not None and self.encoding["motion"] != "camera":
            raise DataError(
                f"{folder}: expected clips with camera motion, got {self.encoding['motion']}"
            )
        self.bucket = bucket
        self.shards = buckets[bucket]["shards"]
        self.ends = list(itertools.accumulate(shard["clips"] for shard in self.shards))
        for shard in self.shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise DataError(f"{path}: expected {shard['bytes']} bytes, got {size}")
        self._open = functools.lru_cache(maxsize=64)(self._read_shard)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def latent_frames(self) -> int:
        """Of a clip, after its first."""
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
        return self._batch(windows, random.device)

    def whole(self, clips: Sequence[int]) -> ClipBatch:
        """The clips of these numbers from end to end, each with the first of its captions."""
        windows = [self._window(clip, 0, self.latent_frames, 0.0) for clip in clips]
        return self._batch(windows, torch.device("cpu"))

    @staticmethod
    def _batch(
        windows: Sequence[tuple[Tensor, Tensor | None, str]], device: torch.device
    ) -> ClipBatch:
        latents, motion, prompts = zip(*windows)
        moved = None if motion[0] is None else torch.stack(motion).to(device)
        return ClipBatch(torch.stack(latents).to(device), moved, prompts)

    def _window(
        self, clip: int, start: int, frames: int, choice: float
    ) -> tuple[Tensor, Tensor | None, str]:
        """`choice` in [0, 1) picks one of the clip's captions."""
        number = bisect.bisect_right(self.ends, clip)
        clip -= self.ends[number - 1] if number else 0
        path = self.folder / self.shards[number]["file"]
        try:
            shard, clips = self._open(path)
            latents = shard.get_slice("latents")[clip, :, start : start + frames + 1].float()
            motion = None
            if self.encoding["motion"] == "camera":
                poses = shard.get_slice("poses")[clip, start : start + frames]
                lens = shard.get_slice("lens")[clip]
                motion = through_lens(poses, lens, self.camera, *latents.shape[-2:])
            elif self.encoding["motion"] == "pose":
                motion = shard.get_slice("skeletons")[clip, :, start : start + frames].float()
            captions = clips[clip]["captions"]
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            raise DataError(f"{path}: expected a whole shard of clips: {error}") from None
        return latents, motion, captions[int(choice * len(captions))]

    @staticmethod
    def _read_shard(path: Path):
        shard = safe_open(path, framework="pt")
        return shard, json.loads(shard.metadata()["clips"])


class Mixture:
    """Clips of several folders or buckets as one set, of any sizes and lengths: every update draws
    all of its clips from one of those whose clips are long enough, as often as it has clips.

    A batch has one size, so an update that draws several times draws from its `part`.
    """

    def __init__(self, parts: Sequence[LatentShards]):
        self.parts = parts

    @property
    def latent_frames(self) -> int:
        """Of the longest clips, after their first."""
        return max(part.latent_frames for part in self.parts)

    def part(self, random: ClipRandom, frames: int) -> LatentShards:
        """See `Clips.part`. ValueError if no clips are as long."""
        fitting = [part for part in self.parts if part.latent_frames >= frames]
        if not fitting:
            raise ValueError(
                f"frames: expected at most {self.latent_frames} after the first, as the longest "
                f"clips have, got {frames}"
            )
        clips = sum(map(len, fitting))
        # From what seeds the update's shared numbers, not from these: they move on with every draw.
        update = random.shared.bit_generator.seed_seq.entropy
        chosen = np.random.default_rng([*update, 2])
        return fitting[chosen.choice(len(fitting), p=[len(part) / clips for part in fitting])]

    def sample(
        self, random: ClipRandom, frames: int, first_frame: FirstFrame = "half"
    ) -> ClipBatch:
        needed = frames + 1 if first_frame == "never" else frames
        return self.part(random, needed).sample(random, frames, first_frame)
