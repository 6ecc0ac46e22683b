"""Sources of training videos: folder trees and tar shards, sorted by name on every machine.

Nothing with the name of a video or an archive is left out silently. What cannot be read is a sample
with a fault, which the job names and counts.
"""

import os
import stat
from pathlib import Path

from .sample import (
    DISK_ERRORS,
    FILE_SUFFIXES,
    SIDECARS,
    Blob,
    Sample,
    Skipped,
    faulty,
    group_samples,
    path_errors,
)
from .tars import tar_samples


def find_samples(source: Path) -> list[Sample]:
    """All samples of a folder tree with videos and tar shards, of one tar shard or of one video.

    Sorted by name. ValueError if the source holds none or may not be read; OSError if the disk
    fails.
    """
    try:
        is_folder = stat.S_ISDIR(source.stat().st_mode)
        if is_folder:
            with os.scandir(source):  # may it be listed?
                pass
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise ValueError(
            f"videos: expected a folder, a .tar or a video, got {source}: {error.strerror}"
        ) from None
    files, samples = _tree(source, "") if is_folder else _beside(source)
    samples += group_samples(files)
    for name, blob in files.items():
        if name.lower().endswith(".tar"):
            samples += tar_samples(name, blob)
    if not samples:
        raise ValueError(f"videos: expected videos or .tar shards in {source}, found none")
    return sorted(samples, key=lambda sample: sample.name)


def _beside(file: Path) -> tuple[dict[str, Blob], list[Sample]]:
    """One file and its sidecars; see `_tree`."""
    files = {file.name: Blob(file)}
    for kind in SIDECARS:
        sidecar = file.with_name(f"{file.stem}.{kind}")
        if os.path.lexists(sidecar):
            files[sidecar.name] = Blob(sidecar)
    folder = file.with_name(f"{file.stem}.keypoints")
    below, faults = _tree(folder, f"{folder.name}/") if os.path.isdir(folder) else ({}, [])
    return files | below, faults


def _tree(root: Path, prefix: str) -> tuple[dict[str, Blob], list[Sample]]:
    """Files below `root` by their paths, and faulty samples for folders that cannot be listed and
    links that lead nowhere.

    Links are followed. A folder with several paths is read once, by the path without links if there
    is one.
    """
    files, faults, seen = {}, [], set()
    folders, links = [(root, prefix)], []
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop(0)
        try:
            entries = _unseen_entries(folder, seen)
        except Skipped as skipped:
            faults.append(faulty(prefix[:-1], skipped))
            continue
        for entry in entries:
            path, name = folder / entry.name, prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append((path, f"{name}/"))
                continue
            try:
                if entry.is_symlink() and _is_folder(path):
                    links.append((path, f"{name}/"))
                    continue
            except Skipped as skipped:
                if not name.lower().endswith(FILE_SUFFIXES):  # it may have led to a folder
                    faults.append(faulty(name, skipped))
            files[name] = Blob(path)
    return files, faults


def _unseen_entries(folder: Path, seen: set[tuple[int, int]]) -> list[os.DirEntry]:
    """Entries in the order of their names; none if the folder is in `seen`."""
    with path_errors():
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)


def _is_folder(path: Path) -> bool:
    with path_errors():
        return stat.S_ISDIR(path.stat().st_mode)
