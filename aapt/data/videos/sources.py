"""Where training videos come from: files of a folder tree and members of tar shards.

Both hold a video and its sidecars under one name: `a/b.mp4`, `a/b.txt` or `a/b.json` with the
caption, `a/b.camera.txt` and `a/b.keypoints.json`, or a folder `a/b.keypoints` with a file for each
picture. The order is that of the names, whatever the file system or the machine.
"""

import io
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)


class Skipped(Exception):
    """Something of a source that cannot be used: a `reason` to count by, and the details."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Blob:
    """A file, or with a size the bytes of a tar member."""

    path: Path
    offset: int = 0
    size: int | None = None

    def open(self) -> BinaryIO:
        """Skipped where the file is gone or may not be read; any other OSError is the disk's."""
        try:
            file = self.path.open("rb")
            if self.size is None:
                return file
            with file:
                file.seek(self.offset)
                return io.BytesIO(file.read(self.size))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise Skipped("unreadable", error.strerror) from None

    def text(self, reason: str) -> str:
        """The whole as UTF-8; Skipped for `reason` where it is not."""
        with self.open() as file:
            try:
                return file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise Skipped(reason, f"not UTF-8: {error.reason}") from None

    def json(self, reason: str) -> Any:
        """The whole as JSON; Skipped for `reason` where it is not."""
        try:
            return json.loads(self.text(reason))
        except (ValueError, RecursionError) as error:
            raise Skipped(reason, f"expected JSON: {error}") from None


@dataclass(frozen=True)
class Sample:
    """A video and what goes with it, by kind: `txt`, `json`, `camera.txt`, `keypoints.json`.

    `pictures`: the files of the folder `keypoints`, by the number in their name. `broken` says why
    a source that should hold samples could not be listed; it has no video then.
    """

    name: str  # relative to the source, with the video's suffix
    video: Blob | None
    sidecars: Mapping[str, Blob]
    pictures: Mapping[int, Blob] = field(default_factory=dict)
    broken: str = ""

    def sidecar(self, kind: str, missing: str) -> Blob:
        if kind not in self.sidecars:
            stem = self.name.rpartition(".")[0]
            raise Skipped(missing, f"expected {stem}.{kind}")
        return self.sidecars[kind]

    def captions(self) -> list[str]:
        """One or more descriptions of the video. Skipped if there is none."""
        if "txt" in self.sidecars:
            captions = [self.sidecars["txt"].text("bad caption")]
        elif "json" in self.sidecars:
            captions = _json_captions(self.sidecars["json"].json("bad caption"))
        else:
            self.sidecar("txt", "no caption")
        captions = [" ".join(caption.split()) for caption in captions]
        if not (captions := [caption for caption in captions if caption]):
            raise Skipped("no caption", "the caption is empty")
        return captions

    def keypoints(self) -> Any:
        """The JSON of `keypoints.json`, or a list of that of all pictures. Skipped if there is
        neither, or if a picture's is missing."""
        if not self.pictures:
            return self.sidecar("keypoints.json", "no keypoints").json("bad keypoints")
        entries, first = [], min(self.pictures)
        for number in range(first, first + len(self.pictures)):
            if number not in self.pictures:
                raise Skipped("bad keypoints", f"expected a file for picture {number}, got none")
            try:
                entries.append(self.pictures[number].json("bad keypoints"))
            except Skipped as skipped:
                raise Skipped(skipped.reason, f"file {number}: {skipped.detail}") from None
        return entries


def _json_captions(fields: Any) -> list[str]:
    fields = fields if isinstance(fields, dict) else {}
    captions = fields.get("captions", fields.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise Skipped("bad caption", "expected a string 'caption' or a list of them 'captions'")
    return captions


def find_samples(source: Path) -> list[Sample]:
    """All samples of a folder tree with videos and tar shards, of one tar shard or of one video.

    Sorted by name. ValueError if the source holds none.
    """
    if not source.exists():
        raise ValueError(f"videos: expected a folder, a .tar or a video, got {source}: not there")
    root = source if source.is_dir() else source.parent
    files: dict[str, Blob] = {}
    for folder, folders, names in os.walk(root):
        if root != source:  # nothing below it, but for the keypoints of one video
            folders[:] = {f"{source.stem}.keypoints"}.intersection(folders)
        for name in names:
            path = Path(folder, name)
            files[path.relative_to(root).as_posix()] = Blob(path)
    samples = _group(files)
    for name, blob in files.items():
        if name.endswith(".tar") and source in (root, blob.path):
            samples += _tar_samples(name, blob.path)
    if root != source:
        samples = [s for s in samples if s.name.split("//")[0] == source.name]
    if not samples:
        raise ValueError(f"videos: expected videos or .tar shards in {source}, found none")
    return sorted(samples, key=lambda sample: sample.name)


def _group(files: Mapping[str, Blob], prefix: str = "") -> list[Sample]:
    samples, pictures = [], defaultdict(dict)
    for name, blob in files.items():
        folder, _, file = name.rpartition("/")
        if folder.endswith(".keypoints") and (number := re.search(r"(\d+)\D*\.json$", file)):
            pictures[folder][int(number[1])] = blob
    for name, blob in files.items():
        stem, dot, suffix = name.rpartition(".")
        if (dot + suffix).lower() not in VIDEO_SUFFIXES or name.rpartition("/")[2][0] == ".":
            continue
        sidecars = {
            kind: files[f"{stem}.{kind}"]
            for kind in ("txt", "json", "camera.txt", "keypoints.json")
            if f"{stem}.{kind}" in files
        }
        samples.append(Sample(prefix + name, blob, sidecars, pictures[f"{stem}.keypoints"]))
    return samples


def _tar_samples(name: str, path: Path) -> list[Sample]:
    """The samples of a tar shard as far as it can be read, and one that says where that ends."""
    files, broken = {}, ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    files[member.name] = Blob(path, member.offset_data, member.size)
            # tarfile takes whatever follows the first member for the end
            archive.fileobj.seek(archive.offset)
            if archive.offset > path.stat().st_size or archive.fileobj.read(512).strip(b"\0"):
                broken = f"after {len(files)} files: damaged or truncated"
    except (tarfile.TarError, OSError, ValueError) as error:
        broken = f"after {len(files)} files: {error}"
    samples = _group(files, name + "//")
    if broken:
        samples.append(Sample(name, None, {}, broken=broken))
    return samples
