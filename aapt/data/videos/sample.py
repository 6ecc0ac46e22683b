"""Samples of a source: a video and its sidecars, files or members of a tar.

A video and its sidecars share one name: `a/b.mp4`, `a/b.txt` or `a/b.json` with the caption,
`a/b.camera.txt` and `a/b.keypoints.json`, or a folder `a/b.keypoints` with a file per video frame.
"""

import errno
import io
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

VIDEO_SUFFIXES = tuple(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)
SIDECARS = ("txt", "json", "camera.txt", "keypoints.json")
# Archives that are named and not read: their members have no place on the disk.
UNREAD_ARCHIVES = tuple(
    ".7z .rar .tar.bz2 .tar.gz .tar.lz4 .tar.xz .tar.zst .tbz .tbz2 .tgz .txz .tzst .zip".split()
)
FILE_SUFFIXES = (*VIDEO_SUFFIXES, *(f".{kind}" for kind in SIDECARS), ".tar", *UNREAD_ARCHIVES)
# Errors of a disk or a machine. Every other error that the system gives for a path is the path's.
DISK_ERRORS = frozenset(
    (
        *(errno.EIO, errno.ENODEV, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM),
        *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET),
        *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
    )
)


class Skipped(Exception):
    """A reason to skip something of a source: a `reason` to count by, and a `detail`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextmanager
def path_errors() -> Iterator[None]:
    """Turn an OSError of a path into Skipped for `unreadable`; an error of the disk passes."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise Skipped("unreadable", error.strerror or str(error)) from None


@dataclass(frozen=True)
class Blob:
    """A file, or with a size the bytes of a tar member; with a fault, one that cannot be read."""

    path: Path
    offset: int = 0
    size: int | None = None
    fault: str = ""

    def open(self) -> BinaryIO:
        """Open the bytes. Skipped unless they are a regular file that may be read; OSError if the
        disk fails."""
        self.status()
        with path_errors():
            file = self.path.open("rb")
            if self.size is None:
                return file
            with file:
                file.seek(self.offset)
                return io.BytesIO(file.read(self.size))

    def status(self) -> os.stat_result:
        """The file's status, for a tar member that of the tar; errors as of `open`."""
        if self.fault:
            raise Skipped("unreadable", self.fault)
        with path_errors():
            status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise Skipped("unreadable", "expected a regular file")
        return status

    def read(self) -> bytes:
        """All bytes; errors as of `open`."""
        with self.open() as file, path_errors():
            return file.read()

    def text(self, reason: str) -> str:
        """The text in UTF-8. Skipped for `reason` if the bytes are not UTF-8."""
        try:
            return self.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Skipped(reason, f"not UTF-8: {error.reason}") from None

    def json(self, reason: str) -> Any:
        """The value in JSON. Skipped for `reason` if the text is not JSON."""
        try:
            return json.loads(self.text(reason))
        except (ValueError, RecursionError) as error:
            raise Skipped(reason, f"expected JSON: {error}") from None


@dataclass(frozen=True)
class Sample:
    """A video and its sidecars.

    Attributes:
        name: Path relative to the source, with the video's suffix; members of a tar after `//`.
        video: The file; None with a fault.
        sidecars: Files by their kind, one of SIDECARS.
        pictures: Files of the folder `keypoints`, by the number in their names.
        fault: (reason, detail) for a part of the source that cannot be read, such as a folder or
            an archive; there is no video then.
    """

    name: str
    video: Blob | None
    sidecars: Mapping[str, Blob] = field(default_factory=dict)
    pictures: Mapping[int, Blob] = field(default_factory=dict)
    fault: tuple[str, str] | None = None

    def open(self) -> BinaryIO:
        """The video's bytes. Skipped if the video cannot be read."""
        if self.video is None:
            raise Skipped(*self.fault)
        return self.video.open()

    def used(self, motion: str) -> dict[str, list[Blob]]:
        """The files that clips with this kind of motion are made of, by their names."""
        kinds = ["txt" if "txt" in self.sidecars else "json"]
        kinds += {"none": [], "camera": ["camera.txt"], "pose": ["keypoints.json"]}[motion]
        stem = self.name.rpartition(".")[0]
        files = {self.name: [self.video]} if self.video else {}
        found = [kind for kind in kinds if kind in self.sidecars]
        files |= {f"{stem}.{kind}": [self.sidecars[kind]] for kind in found}
        if motion == "pose" and self.pictures:
            files[f"{stem}.keypoints"] = [self.pictures[n] for n in sorted(self.pictures)]
        return files

    def sidecar(self, kind: str, missing: str) -> Blob:
        """The sidecar of a kind. Skipped for the reason `missing` if there is none."""
        if kind not in self.sidecars:
            stem = self.name.rpartition(".")[0]
            raise Skipped(missing, f"expected {stem}.{kind}")
        return self.sidecars[kind]

    def captions(self) -> list[str]:
        """One or more descriptions of the video. Skipped if there are none."""
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
        """The value of `keypoints.json`, or a list of the values of the folder `keypoints`. Skipped
        if there is neither, or if the folder's numbers have a hole."""
        if not self.pictures:
            return self.sidecar("keypoints.json", "no keypoints").json("bad keypoints")
        entries, first = [], min(self.pictures)
        for number in range(first, first + len(self.pictures)):
            if number not in self.pictures:
                raise Skipped("bad keypoints", f"expected a file with number {number}, got none")
            try:
                entry = self.pictures[number].json("bad keypoints")
            except Skipped as skipped:
                raise Skipped(skipped.reason, f"file {number}: {skipped.detail}") from None
            if isinstance(entry, dict):
                entry.pop("frame_id", None)  # the number in the name gives the place
            entries.append(entry)
        return entries


def _json_captions(fields: Any) -> list[str]:
    fields = fields if isinstance(fields, dict) else {}
    captions = fields.get("captions", fields.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise Skipped("bad caption", "expected a string 'caption' or a list of strings 'captions'")
    return captions


def faulty(name: str, skipped: Skipped) -> Sample:
    """A sample without a video, for a part of the source that cannot be read."""
    return Sample(name, None, fault=(skipped.reason, skipped.detail))


def group_samples(files: Mapping[str, Blob], tar: str = "") -> list[Sample]:
    """The samples among files by their paths. Files whose names begin with a dot are left out.

    tar: name of the shard, for members of a shard. An archive that is not read, such as an archive
    inside a shard, gives a faulty sample.
    """
    samples, sidecars, pictures = [], defaultdict(dict), defaultdict(dict)
    prefix, unread = (f"{tar}//", (".tar", *UNREAD_ARCHIVES)) if tar else ("", UNREAD_ARCHIVES)
    for name in sorted(files):  # capitals first, so that of a.TXT and a.txt the latter is read
        folder, _, file = name.rpartition("/")
        number = re.search(r"(\d+)\D*\.json$", file, re.IGNORECASE)
        if number and folder.lower().endswith(".keypoints"):
            pictures[folder.rpartition(".")[0]][int(number[1])] = files[name]
        for kind in SIDECARS:
            if name.lower().endswith(f".{kind}"):
                sidecars[name[: -len(kind) - 1]][kind] = files[name]
    for name, blob in files.items():
        if name.rpartition("/")[2].startswith("."):
            continue
        if name.lower().endswith(unread):
            detail = "expected a .tar that is not compressed, in a folder; unpack the archive"
            samples.append(faulty(prefix + name, Skipped("unread archive", detail)))
        elif name.lower().endswith(VIDEO_SUFFIXES):
            stem = name.rpartition(".")[0]
            samples.append(Sample(prefix + name, blob, sidecars[stem], pictures[stem]))
    return samples
