"""`aapt encode`: videos in, shards of latents out.

Videos are read in the order of their names, and the n-th clip of a bucket goes into place n of its
shards, so the bytes of a shard do not depend on who decodes, nor on where an earlier run stopped.
That is found out from the index, which lists whole shards, and `videos.jsonl`, which remembers how
many clips each video gave; what lies between the two is read again.
"""

import dataclasses
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import file_digest, save_config, save_tensors, write_json
from ...model.conditioning import MEASURED_FIELD_OF_VIEW, camera_rays, through_lens
from ...model.config import CameraConfig
from ...model.text import prompt_bytes
from ...vae import CausalVAE
from ...vae.folder import LIGHT, save_vaes, vae_digest
from ...vae.pixels import to_video
from ..latent_shards import FORMAT_VERSION, INDEX, DataError, ray_deviation, read_index
from .clip_reader import CutConfig, RawClip, read_clips
from .sources import Sample, Skipped, find_samples

JOURNAL = "videos.jsonl"


class EncodeError(Exception):
    """Why encoding could not go on. What was written is whole, and a later run goes on from it."""


def summary(index: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of (name, value) that tell what is encoded and what was skipped."""
    videos, encoding = index["videos"], index["encoding"]
    seconds = encoding["latent_frames"] * encoding["frames_per_latent"] / encoding["fps"]
    rows = [
        ("videos", f"{videos['used']} used of {videos['read']} read, {videos['found']} found"),
        ("clips", f"{seconds:.2f} s each, motion {encoding['motion']}"),
    ]
    rows += [
        (f"  {name}", f"{bucket['clips']} in {len(bucket['shards'])} shards")
        for name, bucket in index["buckets"].items()
    ]
    lengths = [int(n) for bucket in index["buckets"].values() for n in bucket["caption_bytes"]]
    if lengths:
        rows.append(("captions", f"up to {max(lengths)} bytes"))
    if "deviation" in index:
        deviation = index["deviation"]
        text = f"origin {deviation['origin']:.4g}, direction {deviation['direction']:.4g}"
        rows.append(("rays", f"deviation of {text}"))
    rows.append(("skipped", f"{sum(index['skipped'].values())}"))
    rows += [(f"  {reason}", f"{count}") for reason, count in index["skipped"].items()]
    return rows


@dataclass
class Outcome:
    """What became of one video: by bucket the place of its first clip and their number, and
    [reason, detail] of each skip."""

    video: str
    clips: dict[str, list[int]] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)


def encode(
    source: Path,
    vae: CausalVAE,
    out: Path,
    config: CutConfig,
    *,
    shard_clips: int = 256,
    workers: int = 2,
    report: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Encode all clips of `source` into `out` and return the index, see `latent_shards`.

    workers: threads that decode. stop: asked after every clip; once true, the job ends with what
    is written so far. Raises ValueError where the source holds no videos or the folder belongs to
    another job, EncodeError where the output cannot be written or the source's disk fails.
    """
    samples = find_samples(source)
    try:
        folder = ShardFolder(out, _encoding(vae, config, shard_clips), samples, vae)
    except OSError as error:
        raise EncodeError(f"{error}") from None
    if folder.complete:
        return folder.index()
    if folder.written:
        report(f"{folder.contents()}: going on")
    todo = [number for number in range(len(samples)) if not folder.is_done(number)]
    shards: dict[str, Shard] = {}
    try:
        with closing(read_ahead((samples[n] for n in todo), config, workers)) as videos:
            for number, clips in zip(todo, videos):
                outcome = Outcome(samples[number].name)
                for clip in clips:
                    if stop():
                        return folder.save()
                    if isinstance(clip, Skipped):
                        outcome.skipped.append([clip.reason, clip.detail])
                        continue
                    bucket = str(clip.bucket)
                    first, count = outcome.clips.setdefault(
                        bucket, [folder.first_place(number, bucket), 0]
                    )
                    place = first + count
                    outcome.clips[bucket][1] += 1
                    if place < folder.written[bucket]:
                        continue
                    shard = shards.setdefault(bucket, Shard(vae))
                    shard.add(clip)
                    if len(shard.clips) == shard_clips:
                        folder.write(bucket, shards.pop(bucket), report)
                folder.record(number, outcome)
        for bucket in sorted(shards):
            folder.write(bucket, shards[bucket], report)
        folder.complete = True
        return folder.save()
    except OSError as error:
        raise EncodeError(f"{error}; {folder.contents()}") from None


def read_ahead(
    samples: Iterable[Sample], config: CutConfig, workers: int
) -> Iterator[Iterator[RawClip | Skipped]]:
    """The clips of each sample, in order, while threads decode the next clip of it and of the
    `workers` - 1 samples after it."""
    waiting = (read_clips(sample, config) for sample in samples)
    with ThreadPoolExecutor(workers) as pool:
        running = deque()

        def drain() -> Iterator[RawClip | Skipped]:
            clips, following = running[0]
            while (clip := following.result()) is not None:
                following = pool.submit(next, clips, None)
                yield clip

        try:
            while True:
                for clips in islice(waiting, workers - len(running)):
                    running.append((clips, pool.submit(next, clips, None)))
                if not running:
                    return
                yield drain()
                running.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


class Shard:
    """Clips of one bucket on their way into a file."""

    def __init__(self, vae: CausalVAE):
        self.vae = vae
        self.clips: list[dict[str, Any]] = []
        self.tensors: dict[str, list[Tensor]] = {}
        self.squares = torch.zeros(2, dtype=torch.float64)  # of ray origins, of directions

    @torch.inference_mode()
    def add(self, clip: RawClip) -> None:
        tensors = {"latents": self._encode(clip.video, clip.source)}
        if clip.poses is not None:
            tensors |= {"poses": clip.poses, "lens": clip.lens}
            self.squares += _ray_squares(clip, *tensors["latents"].shape[-2:])
        if clip.skeletons is not None:  # a latent frame is moved by its own drawing
            tensors["skeletons"] = self._encode(clip.skeletons, clip.source)[:, 1:]
        for name, tensor in tensors.items():
            self.tensors.setdefault(name, []).append(tensor)
        start = round(clip.start, 6)
        self.clips.append({"video": clip.source, "start": start, "captions": clip.captions})

    def _encode(self, frames, source: str) -> Tensor:
        """uint8 (F, H, W, 3) -> (C, 1 + T, h, w) float16."""
        mean = self.vae.latent_mean
        video = to_video(torch.from_numpy(frames)[None].to(mean.device)).to(mean.dtype)
        latent = self.vae.encode(video)[0].half().cpu()
        if not latent.isfinite().all():
            raise EncodeError(f"{source}: the VAE's latents are not finite in float16")
        return latent

    def write(self, path: Path) -> None:
        stacked = {name: torch.stack(tensors) for name, tensors in self.tensors.items()}
        save_tensors(path, stacked, {"clips": json.dumps(self.clips)})


def _ray_squares(clip: RawClip, height: int, width: int) -> Tensor:
    """Mean squares of the clip's ray origins and directions, at unit scale (SPEC 10)."""
    frames = clip.poses.shape[1]
    unit = CameraConfig(MEASURED_FIELD_OF_VIEW, 0.0, 0.0, 1.0, 1.0, frames)
    poses = through_lens(clip.poses, clip.lens, unit, height, width)
    rays = camera_rays(poses[None], unit, height, width)[0].unflatten(0, (frames, 2, 3))
    return rays.double().square().mean(dim=(0, 2, 3, 4, 5))


def _encoding(vae: CausalVAE, config: CutConfig, shard_clips: int) -> dict[str, Any]:
    """All that decides over the bytes of the shards, but for the videos."""
    return {
        **dataclasses.asdict(config),
        "buckets": ["+".join(map(str, family)) for family in config.buckets],
        "shard_clips": shard_clips,
        "vae": vae_digest(vae),
    }


class ShardFolder:
    """The output of one job: whole shards, and how far they reach.

    Raises ValueError where the folder belongs to another job.
    """

    def __init__(self, out: Path, encoding: dict[str, Any], samples: list[Sample], vae: CausalVAE):
        self.out, self.encoding, self.videos = out, encoding, len(samples)
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self.written = Counter()  # clips of each bucket in whole shards
        self.caption_bytes = defaultdict(Counter)  # these clips by the length of a caption
        self.outcomes: list[Outcome] = []
        self.found = Counter()  # clips of each bucket in the videos of these outcomes
        self.complete = False
        if (out / INDEX).exists():
            self._resume(samples)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"out: expected a new folder or one of encoded clips, got {out}")
        else:
            out.mkdir(parents=True, exist_ok=True)
            self.save()
        if not (out / "config.json").exists():  # beside the latents, what decodes them
            save_config(out, save_vaes(out, {LIGHT: vae}))

    def _resume(self, samples: list[Sample]) -> None:
        index = read_index(self.out)
        for name, value in self.encoding.items():
            if index["encoding"].get(name) != value:
                raise ValueError(
                    f"out: expected a new folder, {self.out} was encoded with {name} "
                    f"{index['encoding'].get(name)}, not {value}"
                )
        self.complete = index["complete"]
        for name, bucket in index["buckets"].items():
            self.shards[name], self.written[name] = bucket["shards"], bucket["clips"]
            for length, clips in bucket.get("caption_bytes", {}).items():
                self.caption_bytes[name][int(length)] = clips
        journal = self.out / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # the disk was full, or the machine went down
            lines.pop()
            os.truncate(journal, sum(map(len, lines)))
        for number, line in enumerate(lines, start=1):
            try:
                self._add(Outcome(**json.loads(line)))
            except (ValueError, TypeError, AttributeError):
                raise DataError(f"{journal}: line {number}: expected a video's outcome") from None
        names = [sample.name for sample in samples]
        known = [outcome.video for outcome in self.outcomes]
        if known != names[: len(known)] or (self.complete and len(known) != len(names)):
            raise ValueError(
                f"videos: expected those of the run that began {self.out}, got others; take a new "
                "folder"
            )

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.found.update({bucket: count for bucket, (_, count) in outcome.clips.items()})

    def first_place(self, number: int, bucket: str) -> int:
        """The place in its bucket of the first clip of video `number`."""
        known = number < len(self.outcomes)
        return self.outcomes[number].clips[bucket][0] if known else self.found[bucket]

    def is_done(self, number: int) -> bool:
        """Whether all clips of video `number` are known and in whole shards."""
        if number >= len(self.outcomes):
            return False
        clips = self.outcomes[number].clips
        return all(first + count <= self.written[name] for name, (first, count) in clips.items())

    def contents(self) -> str:
        """What a later run, or a reader, finds."""
        shards = sum(map(len, self.shards.values()))
        return f"{self.out} holds {self.written.total()} clips in {shards} whole shards"

    def write(self, bucket: str, shard: Shard, report: Callable[[str], None]) -> None:
        shards = self.shards.get(bucket, [])
        name = f"{bucket}/{len(shards):05d}.safetensors"
        path = self.out / name
        shard.write(path)
        entry = {"file": name, "clips": len(shard.clips), "bytes": path.stat().st_size}
        entry["sha256"] = file_digest(path)
        if self.encoding["motion"] == "camera":
            entry["ray_squares"] = (shard.squares / len(shard.clips)).tolist()
        self.shards[bucket] = [*shards, entry]
        self.written[bucket] += len(shard.clips)
        longest = (max(map(len, map(prompt_bytes, clip["captions"]))) for clip in shard.clips)
        self.caption_bytes[bucket].update(longest)
        self.save()
        report(f"{name}: {len(shard.clips)} clips; {len(self.outcomes)} of {self.videos} videos")

    def record(self, number: int, outcome: Outcome) -> None:
        """Remember what became of video `number`, unless an earlier run did."""
        if number == len(self.outcomes):
            with (self.out / JOURNAL).open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            self._add(outcome)

    def save(self) -> dict[str, Any]:
        """Write the index, and return it."""
        index = self.index()
        write_json(self.out / INDEX, index)
        return index

    def index(self) -> dict[str, Any]:
        """What `index.json` says: the encoding, the shards, and the counts over all videos."""
        reasons = Counter(reason for outcome in self.outcomes for reason, _ in outcome.skipped)
        index = {
            "format_version": FORMAT_VERSION,
            "complete": self.complete,
            "encoding": self.encoding,
            "videos": {
                "found": self.videos,
                "read": len(self.outcomes),
                "used": sum(bool(outcome.clips) for outcome in self.outcomes),
            },
            "skipped": dict(sorted(reasons.items())),
            "buckets": {
                bucket: {
                    "clips": self.written[bucket],
                    "caption_bytes": {
                        str(n): clips for n, clips in sorted(self.caption_bytes[bucket].items())
                    },
                    "shards": shards,
                }
                for bucket, shards in sorted(self.shards.items())
            },
        }
        entries = [shard for shards in self.shards.values() for shard in shards]
        if deviation := ray_deviation(entries):
            index["deviation"] = dict(zip(("origin", "direction"), deviation))
        return index
