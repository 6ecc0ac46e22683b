"""Clips of the user's videos as pixels, to train and to measure autoencoders on."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .buckets import Bucket, crop
from .sample import Sample, Skipped
from .sources import find_samples
from .video_reader import at_rate, file_errors, pictures


def video_clips(
    source: Path,
    size: Bucket,
    frames: int,
    count: int,
    *,
    fps: int = 24,
    report: Callable[[str], None] = print,
) -> Iterator[Tensor]:
    """Yield at most `count` clips of `frames` video frames, uint8 (frames, H, W, 3), cropped to
    `size`.

    The clips are spread over the videos in the order of the names, as few per video as suffice. No
    clip crosses a gap. A video that cannot be read is reported and left out. ValueError if no video
    is long enough for a clip; OSError if the disk fails.
    """
    samples = find_samples(source)
    each = math.ceil(count / len(samples))
    made = 0
    for sample in samples[:: max(1, len(samples) // count)]:
        try:
            for clip in islice(_cut(sample, size, frames, fps), min(each, count - made)):
                made += 1
                yield clip
        except Skipped as skipped:
            name = sample.name.encode(errors="backslashreplace").decode()  # need not be UTF-8
            report(f"{name}: {skipped}")
        if made == count:
            return
    if not made:
        raise ValueError(
            f"videos: expected videos of {frames} frames or more at {fps} fps in {source}, got none"
        )


def source_digest(source: Path) -> str:
    """SHA-256 of the names and sizes of a source's videos. ValueError if the source has none."""
    digest = hashlib.sha256()
    for sample in find_samples(source):
        # A name need not be UTF-8: the bytes are those of the file system.
        digest.update(os.fsencode(f"{sample.name}\0{_size(sample)}\n"))
    return digest.hexdigest()


def _size(sample: Sample) -> int | None:
    """Bytes of the video; None if it cannot be read."""
    if sample.video is None:
        return None
    try:
        status = sample.video.status()
    except Skipped:
        return None
    return status.st_size if sample.video.size is None else sample.video.size


def _cut(sample: Sample, size: Bucket, frames: int, fps: int) -> Iterator[Tensor]:
    clip: list[np.ndarray] = []
    take = 0
    with file_errors(), sample.open() as file:
        for _, picture in at_rate(pictures(file), fps):
            if picture.take != take:  # no clip crosses a gap
                clip, take = [], picture.take
            part = crop(*picture.size, size, picture.pixel_aspect)
            clip.append(part.window(picture.pixels(*part.scaled)))
            if len(clip) == frames:
                yield torch.from_numpy(np.stack(clip))
                clip = []
