"""Stamps of a sample's files, by which a resumed job sees that its videos are still the same."""

import hashlib
from collections.abc import Mapping, Sequence

from .sample import Blob, Sample, Skipped

# [bytes, time of the last change in ns, SHA-256]; sums and one digest for several files; None for
# files that cannot be read.
Stamp = list[int | str] | None


def sample_stamps(sample: Sample, motion: str) -> dict[str, Stamp]:
    """Stamps of the files that the sample's clips are made of, by the names of the files."""
    return {name: _stamp(blobs) for name, blobs in sample.used(motion).items()}


def changed_file(sample: Sample, motion: str, known: Mapping[str, Stamp]) -> str | None:
    """Return the first difference from the stamps of an earlier run, such as 'a.txt, which is new';
    None if there is none. Digests are compared for files of one size and other times."""
    used = sample.used(motion)
    for name in sorted({*used, *known}):
        if name not in known:
            return f"{name}, which is new"
        if name not in used:
            return f"{name}, which is gone"
        if not _is_unchanged(used[name], known[name]):
            return f"{name}, which has changed"
    return None


def _stamp(blobs: Sequence[Blob]) -> Stamp:
    try:
        return [*_size_and_time(blobs), _digest(blobs)]
    except Skipped:
        return None


def _is_unchanged(blobs: Sequence[Blob], known: Stamp) -> bool:
    try:
        size, time = _size_and_time(blobs)
        if known is None or size != known[0]:
            return False
        return time == known[1] or _digest(blobs) == known[2]
    except Skipped:
        return known is None


def _size_and_time(blobs: Sequence[Blob]) -> tuple[int, int]:
    """Sums over the files: a change of one file changes them."""
    statuses = [blob.status() for blob in blobs]
    sizes = (s.st_size if blob.size is None else blob.size for blob, s in zip(blobs, statuses))
    return sum(sizes), sum(status.st_mtime_ns for status in statuses)


def _digest(blobs: Sequence[Blob]) -> str:
    digest = hashlib.sha256()
    for blob in blobs:
        with blob.open() as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
