"""Parts of an encoding job: each process encodes a share of the videos, and the last one joins all.

out/0-of-2/, out/1-of-2/   complete folders of encoded clips, each with its own journal and lock
out/index.json             once all are complete: their shards, by paths into them
out/config.json            with vae.safetensors: the autoencoder, as in every part
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint import write_json
from ...lock import FolderInUse, folder_lock
from ..latent_shards import INDEX, ray_deviation, read_index
from .sample import Sample


@dataclass(frozen=True)
class Part:
    """Part `number`, from 0, of `count`: every `count`-th video in the order of the names."""

    number: int
    count: int

    def __post_init__(self):
        if not 0 <= self.number < self.count:
            raise ValueError(
                f"shard: expected I/N with I from 0 to N - 1, got {self.number}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read a part such as "0/4". ValueError for another form."""
        if not (match := re.fullmatch(r"(\d+)/(\d+)", text)):
            raise ValueError(f"shard: expected I/N such as 0/4, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """The part's share of all samples."""
        return list(samples[self.number :: self.count])

    def folder(self, out: Path) -> Path:
        """The folder of this part in `out`. ValueError if `out` holds parts of another count, or
        clips that were encoded without parts."""
        for other in sorted(out.glob("*-of-*")):
            if not other.name.endswith(f"-of-{self.count}"):
                raise ValueError(
                    f"shard: expected parts as in {other}, got {self.number}/{self.count}; take a "
                    "new folder"
                )
        if (out / INDEX).exists() and not any(out.glob("*-of-*")):
            raise ValueError(f"out: expected a new folder or one of parts, got {out} without parts")
        return out / f"{self.number}-of-{self.count}"


def join(out: Path, count: int, report: Callable[[str], None]) -> None:
    """Write the index of `out` once all parts are complete; until then do nothing.

    ValueError if the parts were encoded differently.
    """
    folders = [Part(number, count).folder(out) for number in range(count)]
    if not all((folder / INDEX).exists() for folder in folders):
        return
    indices = [read_index(folder) for folder in folders]
    if not all(index["complete"] for index in indices):
        return
    for folder, index in zip(folders, indices, strict=True):
        if index["encoding"] != indices[0]["encoding"]:
            raise ValueError(
                f"out: expected parts with one encoding, got another in {folder} than in "
                f"{folders[0]}; remove one and encode it anew"
            )
    try:
        with folder_lock(out):
            for path in (folders[0] / "config.json", *folders[0].glob("*.safetensors")):
                shutil.copyfile(path, out / path.name)
            write_json(out / INDEX, _joined(folders, indices))
    except FolderInUse:  # a process that has completed another part joins them now
        return
    report(f"{out}: joined {count} parts")


def _joined(folders: Sequence[Path], indices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The index of all parts together, with the shards in the order of the parts."""
    skipped, buckets = Counter(), {}
    for folder, index in zip(folders, indices, strict=True):
        skipped.update(index["skipped"])
        for name, bucket in index["buckets"].items():
            whole = buckets.setdefault(name, {"clips": 0, "caption_bytes": Counter(), "shards": []})
            whole["clips"] += bucket["clips"]
            whole["caption_bytes"].update(bucket["caption_bytes"])
            whole["shards"] += [
                {**shard, "file": f"{folder.name}/{shard['file']}"} for shard in bucket["shards"]
            ]
    for bucket in buckets.values():
        lengths = sorted(bucket["caption_bytes"].items(), key=lambda item: int(item[0]))
        bucket["caption_bytes"] = dict(lengths)
    videos = Counter()
    for index in indices:
        videos.update(index["videos"])
    whole = {**indices[0], "videos": dict(videos), "skipped": dict(sorted(skipped.items()))}
    whole["buckets"] = dict(sorted(buckets.items()))
    shards = [shard for bucket in buckets.values() for shard in bucket["shards"]]
    if deviation := ray_deviation(shards):
        whole["deviation"] = dict(zip(("origin", "direction"), deviation))
    return whole
