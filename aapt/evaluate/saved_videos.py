"""Whole videos beside the measures: rollouts and the truth as MP4 files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..checkpoint import replacing
from ..streaming.generator import StreamingGenerator
from .scenes import TRUTH, Scenes
from .video_frames import decode_stream

FOLDER = "videos"


def save_videos(
    out: Path,
    scenes: Scenes,
    generators: Mapping[str, StreamingGenerator],
    latents: Mapping[str, Tensor],
    seed: int,
) -> list[Path]:
    """Write the rollouts of some starts, and the truth of each up to its end, to `out`/videos.

    A name says start, seed of the evaluation and source: `0-meadow-seed-0-truth.mp4`. A slash in a
    source's name becomes %2F. A file is whole or not there.

    Args:
        generators: By source.
        latents: By source: rollouts of the first starts, (count, C, 1 + steps, h, w).

    Returns the paths, start by start. OSError if they cannot be written.
    """
    folder, first = out / FOLDER, next(iter(generators.values()))
    folder.mkdir(parents=True, exist_ok=True)
    count, _, frames, *_ = next(iter(latents.values())).shape
    paths = []
    for start in range(count):
        streams = {TRUTH: scenes.truth_video(first, start, frames - 1)}
        for name, generator in generators.items():
            streams[name] = decode_stream(generator.vae, latents[name][start, None])
        for name, video in streams.items():
            label = scenes.labels[start].replace(" ", "-")
            source = name.replace("%", "%25").replace("/", "%2F")  # different for all sources
            paths.append(folder / f"{label}-seed-{seed}-{source}.mp4")
            _write(paths[-1], video, first)
    return paths


def _write(path: Path, video: Iterable[Tensor], like: StreamingGenerator) -> None:
    from ..media.video import Mp4Writer  # evaluations without videos do without PyAV

    with (
        replacing(path) as partial,
        Mp4Writer(str(partial), like.height, like.width, like.fps, scale=1) as writer,
    ):
        for frames in video:
            writer.write(frames.numpy())
