"""Tar shards as sources: those of WebDataset, and everything else that `tar` and `cat` make."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from .sample import (
    DISK_ERRORS,
    FILE_SUFFIXES,
    VIDEO_SUFFIXES,
    Blob,
    Sample,
    Skipped,
    faulty,
    group_samples,
)

BLOCK = 512  # bytes: every header begins at a multiple
MAX_LINKS = 40  # from link to link, as on Linux

# By names: a file's bytes, the path in the tar of a link's target, None for a folder.
Contents = dict[str, Blob | str | None]


def tar_samples(name: str, tar: Blob) -> list[Sample]:
    """The samples of a tar shard, as far as the shard can be read, and faulty ones for the rest.

    Links have the bytes of their targets. OSError if the disk fails.
    """
    contents: Contents = {}
    broken = []
    try:
        with tar.open() as file:
            for member in _members(file):
                if member.name in contents and member.name.lower().endswith(VIDEO_SUFFIXES):
                    broken.append(f"expected each video once, got {member.name} again")
                contents[member.name] = _content(member, tar)
    except Skipped as skipped:
        return [faulty(name, skipped)]
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        files = sum(content is not None for content in contents.values())
        broken.append(f"after {files} files: {error}")
    samples = _samples(contents, name, tar)
    if broken:
        samples.append(faulty(name, Skipped("broken archive", "; ".join(broken))))
    return samples


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members of all archives in the file, which `cat` may have joined. TarError at damage."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise tarfile.ReadError("empty file")
    end = 0
    while (start := _after_zeros(file, end)) < size:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from archive
            end = archive.offset
        if end > size or end == start:  # tarfile takes a bad header for the archive's end
            raise tarfile.ReadError("damaged or truncated")


def _after_zeros(file: BinaryIO, start: int) -> int:
    """Return the start of the first block from `start` on that is not zero, else the file's
    size."""
    file.seek(start)
    while chunk := file.read(2048 * BLOCK):
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // BLOCK * BLOCK
        start += len(chunk)
    return start


def _content(member: tarfile.TarInfo, tar: Blob) -> Blob | str | None:
    """A file's bytes, a link's target as a path in the tar, or None for a folder."""
    if member.isdir():
        return None
    if member.islnk():
        return posixpath.normpath(member.linkname)
    if member.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    if member.isreg() and not member.issparse():
        return Blob(tar.path, member.offset_data, member.size)
    kind = "a sparse one" if member.issparse() else "a pipe or a device"
    return Blob(tar.path, fault=f"expected a regular member, got {kind}")


def _samples(contents: Contents, tar_name: str, tar: Blob) -> list[Sample]:
    """Samples of the files and of the links to files; faulty ones for links that lead nowhere."""
    paths = {posixpath.normpath(name): content for name, content in contents.items()}
    for path in list(paths):
        for folder in PurePosixPath(path).parents:
            paths.setdefault(str(folder), None)
    files, faults = {}, []
    for name, content in contents.items():
        blob = _followed(content, paths, tar)
        if blob is None:  # a folder, or a link to one, whose members are read by their own names
            continue
        files[name] = blob
        if blob.fault and isinstance(content, str) and not name.lower().endswith(FILE_SUFFIXES):
            faults.append(faulty(f"{tar_name}//{name}", Skipped("unreadable", blob.fault)))
    return group_samples(files, tar_name) + faults


def _followed(content: Blob | str | None, paths: Contents, tar: Blob) -> Blob | None:
    """Follow a link to its last target, or to a faulty file if there is none; return other
    contents."""
    for _ in range(MAX_LINKS):
        if not isinstance(content, str):
            return content
        lost = Blob(tar.path, fault=f"expected the link's target {content} in the tar, got none")
        content = paths.get(content, lost)
    return Blob(tar.path, fault="expected a link to a file, got a circle of links")
