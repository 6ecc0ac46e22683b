"""The output folder of `aapt encode`: whole shards, an index of them, and a journal of videos."""

import dataclasses
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoint import file_digest, save_config, write_json
from ...lock import LOCK
from ...model.text import prompt_bytes
from ...vae import CausalVAE
from ...vae.folder import LIGHT, save_vaes
from ..latent_shards import FORMAT_VERSION, INDEX, DataError, ray_deviation, read_index
from .sample import Sample
from .shard import Shard
from .stamps import Stamp, changed_file

JOURNAL = "videos.jsonl"


@dataclass
class Outcome:
    """The result of one video, a line of the journal.

    Attributes:
        video: Name of the sample.
        clips: By bucket the place of the video's first clip, and the number of clips.
        skipped: [reason, detail] of each skip.
        files: Stamps of the sample's files by their names; None in folders of older versions.
    """

    video: str
    clips: dict[str, list[int]] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)
    files: dict[str, Stamp] | None = None


class ShardFolder:
    """The output of one job: whole shards, and the results of the videos that they come from.

    The folder is new, or it is that of an earlier run of the job. Raises ValueError if it belongs
    to another job, or if the videos have changed since the earlier run.
    """

    def __init__(self, out: Path, encoding: dict[str, Any], samples: list[Sample], vae: CausalVAE):
        self.out, self.encoding, self.videos = out, encoding, len(samples)
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self.written = Counter()  # clips per bucket in whole shards
        self.caption_bytes = defaultdict(Counter)  # the written clips per length of a caption
        self.outcomes: list[Outcome] = []
        self.found = Counter()  # clips per bucket in the videos of `outcomes`
        self.reading: Outcome | None = None  # of the first video without a line in the journal
        self.complete = False
        if (out / INDEX).exists():
            self._resume(samples)
        elif any(path.name != LOCK for path in out.iterdir()):
            raise ValueError(f"out: expected a new folder or one of encoded clips, got {out}")
        else:
            self.save()
        if not (out / "config.json").exists():  # the autoencoder that decodes the latents
            save_config(out, save_vaes(out, {LIGHT: vae}))

    def _resume(self, samples: list[Sample]) -> None:
        index = read_index(self.out)
        for name in {**index["encoding"], **self.encoding}:
            value = self.encoding.get(name)
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
        self._read_journal()
        if "reading" in index and len(self.outcomes) < len(samples):
            self.reading = Outcome(**index["reading"])
        self._check(samples)

    def _read_journal(self) -> None:
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

    def _check(self, samples: list[Sample]) -> None:
        """Raise ValueError unless the samples are those of the earlier run, with the same files."""
        names = [sample.name for sample in samples]
        known = [outcome.video for outcome in self.outcomes]
        if known != names[: len(known)] or (self.complete and len(known) != len(names)):
            raise ValueError(
                f"videos: expected the videos of the run that began {self.out}, got others; take a "
                "new folder"
            )
        begun = [*self.outcomes, *([self.reading] if self.reading else [])]
        for sample, outcome in zip(samples, begun):
            if outcome.video != sample.name or outcome.files is None:
                continue
            if changed := changed_file(sample, self.encoding["motion"], outcome.files):
                raise ValueError(
                    f"videos: expected the files that {self.out} was encoded from, got {changed} "
                    "since; take a new folder, or remove this one to encode all anew"
                )

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.found.update({bucket: count for bucket, (_, count) in outcome.clips.items()})

    def begin(self, number: int, outcome: Outcome) -> Outcome:
        """Take note of a video that is being read; its clips may be written before its line."""
        if number == len(self.outcomes):
            self.reading = outcome
        return outcome

    def first_place(self, number: int, bucket: str) -> int:
        """The place in its bucket of the first clip of video `number`."""
        known = number < len(self.outcomes)
        return self.outcomes[number].clips[bucket][0] if known else self.found[bucket]

    def is_done(self, number: int) -> bool:
        """True if all clips of video `number` are known and in whole shards."""
        if number >= len(self.outcomes):
            return False
        clips = self.outcomes[number].clips
        return all(first + count <= self.written[name] for name, (first, count) in clips.items())

    def contents(self) -> str:
        """The number of written clips and shards, in words."""
        shards = sum(map(len, self.shards.values()))
        return f"{self.out} holds {self.written.total()} clips in {shards} whole shards"

    def write(self, bucket: str, shard: Shard, report: Callable[[str], None]) -> None:
        """Write a shard of a bucket, and the index."""
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
        """Add video `number` to the journal, unless an earlier run did."""
        if number == len(self.outcomes):
            with (self.out / JOURNAL).open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            self._add(outcome)
            self.reading = None

    def save(self) -> None:
        """Write the index."""
        write_json(self.out / INDEX, self.index())

    def index(self) -> dict[str, Any]:
        """The content of `index.json`: the encoding, the shards, and counts over all videos."""
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
        if self.reading:
            index["reading"] = {"video": self.reading.video, "files": self.reading.files}
        if deviation := ray_deviation(entries):
            index["deviation"] = dict(zip(("origin", "direction"), deviation))
        return index
