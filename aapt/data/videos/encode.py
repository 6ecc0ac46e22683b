"""`aapt encode`: videos in, shards of latents out.

Videos are read in the order of their names, and clip n of a bucket goes into place n of its shards.
So the bytes of a shard depend neither on the number of threads nor on where an earlier run stopped.
A run resumes by the index, which lists whole shards, and by the journal, which says how many clips
each video gave; a video is read again if some of its clips are in no whole shard.
"""

import copy
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...lock import folder_lock
from ...model.umt5 import UMT5Weights
from ...vae import CausalVAE
from ...vae.folder import vae_digest
from .clip_reader import CutConfig, RawClip, read_clips
from .parts import Part, join
from .sample import Sample, Skipped
from .shard import EncodeError, Shard
from .shard_folder import Outcome, ShardFolder
from .sources import find_samples
from .stamps import Stamp, sample_stamps


def summary(index: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value) of a table: clips, captions, rays, and skips by reason."""
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


def encode(
    source: Path,
    vae: CausalVAE,
    out: Path,
    config: CutConfig,
    *,
    shard_clips: int = 256,
    workers: int = 2,
    dtype: torch.dtype = torch.float32,
    text: UMT5Weights | None = None,
    part: Part | None = None,
    report: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Encode all clips of `source` into `out` and return the index, see `latent_shards`.

    With a `part`, only its videos are encoded, into a folder inside `out`; the index returned is
    the part's. The process that completes the last part joins all of them, see `parts`.

    Args:
        source: A folder of videos or tar shards, a tar shard, or a video.
        out: A new folder, or the folder of an earlier run, which is resumed.
        shard_clips: Clips per shard.
        workers: Threads that decode.
        dtype: Precision of the autoencoder.
        text: The text encoder whose embeddings of captions are stored; None for none.
        part: The share of the videos that this process encodes; None for all.
        report: Called with one line per shard.
        stop: Called after every clip; once true, the job ends with the shards written so far.

    Raises ValueError if the source holds no videos, if its files have changed since the earlier
    run, or if the folder belongs to another job or is in use; EncodeError if the output cannot be
    written or the source's disk fails.
    """
    if not vae.encodes:
        raise ValueError(
            "model: expected an autoencoder, got a decoder alone; pass the autoencoder that the "
            "decoder was made for"
        )
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"out: expected a new folder or one of encoded clips, got {out}")
    try:
        samples, whole = find_samples(source), out
        if part is not None:
            samples, out = part.samples(samples), part.folder(whole)
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out):
            encoding = _encoding(vae, config, shard_clips, dtype, text)
            folder = ShardFolder(out, encoding, samples, vae)
            if folder.written and not folder.complete:
                report(f"{folder.contents()}: resuming")
            try:
                if not folder.complete:
                    network = (
                        vae if dtype == vae.latent_mean.dtype else copy.deepcopy(vae).to(dtype)
                    )
                    embed = None if text is None else text.embed
                    _fill(folder, samples, network, embed, config, workers, report, stop)
            except OSError as error:
                raise EncodeError(f"{error}; {folder.contents()}") from None
            index = folder.index()
        if part is not None and index["complete"]:
            join(whole, part.count, report)
        return index
    except OSError as error:
        raise EncodeError(f"{error}") from None


def _fill(
    folder: ShardFolder,
    samples: list[Sample],
    vae: CausalVAE,
    embed: Callable[[str], Tensor] | None,
    config: CutConfig,
    workers: int,
    report: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    """Write the shards that an earlier run has not written, until all are or `stop` is true."""
    todo = [number for number in range(len(samples)) if not folder.is_done(number)]
    shards: dict[str, Shard] = {}
    with closing(read_ahead((samples[n] for n in todo), config, workers)) as videos:
        for number, (stamps, clips) in zip(todo, videos):
            outcome = folder.begin(number, Outcome(samples[number].name, files=stamps))
            for clip in clips:
                if stop():
                    folder.save()
                    return
                if isinstance(clip, Skipped):
                    outcome.skipped.append([clip.reason, clip.detail])
                    continue
                bucket = str(clip.bucket)
                first, count = outcome.clips.setdefault(
                    bucket, [folder.first_place(number, bucket), 0]
                )
                outcome.clips[bucket][1] += 1
                if first + count < folder.written[bucket]:
                    continue
                shard = shards.setdefault(bucket, Shard(vae, embed))
                shard.add(clip)
                if len(shard.clips) == folder.encoding["shard_clips"]:
                    folder.write(bucket, shards.pop(bucket), report)
            folder.record(number, outcome)
    for bucket in sorted(shards):
        folder.write(bucket, shards[bucket], report)
    folder.complete = True
    folder.save()


def read_ahead(
    samples: Iterable[Sample], config: CutConfig, workers: int
) -> Iterator[tuple[dict[str, Stamp], Iterator[RawClip | Skipped]]]:
    """Yield for each sample, in order, the stamps of its files and its clips.

    Meanwhile `workers` threads decode: the next clip of this sample and the first clips of the
    samples after it.
    """
    waiting = iter(samples)
    with ThreadPoolExecutor(workers) as pool:
        running = deque()

        def start(sample: Sample) -> tuple[dict[str, Stamp], Iterator, RawClip | Skipped | None]:
            stamps = sample_stamps(sample, config.motion)  # first: the file may change meanwhile
            clips = read_clips(sample, config)
            return stamps, clips, next(clips, None)

        def drain(clips: Iterator, clip: RawClip | Skipped | None) -> Iterator[RawClip | Skipped]:
            while clip is not None:
                following = pool.submit(next, clips, None)
                yield clip
                clip = following.result()

        try:
            while True:
                for sample in islice(waiting, workers - len(running)):
                    running.append(pool.submit(start, sample))
                if not running:
                    return
                stamps, *clips = running[0].result()
                yield stamps, drain(*clips)
                running.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _encoding(
    vae: CausalVAE,
    config: CutConfig,
    shard_clips: int,
    dtype: torch.dtype,
    text: UMT5Weights | None,
) -> dict[str, Any]:
    """Everything but the videos that decides the bytes of the shards. Folders of older versions
    lack the precision, which was float32, and the text encoder."""
    precision = {} if dtype == torch.float32 else {"dtype": str(dtype).removeprefix("torch.")}
    words = {}
    if text is not None:
        words["text"] = {"kind": "umt5", "tokens": text.tokens, "weights": text.digest()}
    return {
        **precision,
        **words,
        **dataclasses.asdict(config),
        "buckets": ["+".join(map(str, family)) for family in config.buckets],
        "shard_clips": shard_clips,
        "vae": vae_digest(vae),
    }
