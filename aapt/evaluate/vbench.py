"""Videos for VBench-I2V (arXiv 2411.13503): from its images, under its names, in its numbers.

VBench reads a folder of videos `PROMPT-INDEX.mp4`, five per image and prompt. The paper measures
videos of 120 and of 1440 video frames.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import replacing, write_json
from ..lock import folder_lock
from ..media.image import fit_image, load_image
from ..media.video import Mp4Writer
from ..model.caches import MODEL
from ..streaming.generator import StreamingGenerator
from .evaluation import placed

LENGTHS = (120, 1440)  # video frames
SAMPLES = 5  # videos per image and prompt
SEEDS = "seeds.json"
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Case:
    """An image to start from, and the prompt that names its videos."""

    prompt: str
    image: Path


def read_cases(images: Path, info: Path | None = None) -> list[Case]:
    """Find the images and prompts to sample.

    images: A folder of images, such as VBench's `crop/16-9`; without `info` each image is named by
    its prompt. info: VBench's `vbench2_i2v_full_info.json`, whose entries have an `image_name` and
    a `prompt_en`; a prompt of several dimensions is sampled once.

    ValueError for no prompt, for a prompt that cannot name a file, and for one without its image.
    """
    if info is None:
        found = [path for path in sorted(images.glob("*")) if path.suffix.lower() in SUFFIXES]
        cases = [Case(path.stem, path) for path in found]
        if not cases:
            raise ValueError(
                f"images: expected images named by their prompts, got none in {images}"
            )
    else:
        try:
            entries = json.loads(info.read_text())
            pairs = dict.fromkeys((entry["prompt_en"], entry["image_name"]) for entry in entries)
            cases = [Case(prompt, images / name) for prompt, name in pairs]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"info: expected a JSON list with prompt_en and image_name per entry, got {info}"
            ) from None
    for case in cases:
        if not case.image.is_file():
            raise ValueError(f"images: expected {case.image.name} in {images}, got none")
        if not isinstance(case.prompt, str) or not case.prompt or "/" in case.prompt:
            raise ValueError(f"info: expected prompts that can name a file, got {case.prompt!r}")
    prompts = [case.prompt for case in cases]
    if len(set(prompts)) < len(prompts):
        twice = next(prompt for prompt in prompts if prompts.count(prompt) > 1)
        raise ValueError(f"info: expected one image per prompt, got two for {twice!r}")
    return cases


def write_videos(
    generator: StreamingGenerator,
    cases: Sequence[Case],
    out: Path,
    *,
    model: str,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Write the videos of all cases to `out`/LENGTH/PROMPT-INDEX.mp4.

    The videos of one index are one stream, of which a shorter video is the beginning. Nothing
    steers a model that takes controls. A video that is there is not made again, and none is ever
    written in part. `seeds.json` holds the seed of every index, the digest of the checkpoint, the
    size, the precision, and the name of the cache if it is not the model's.

    Args:
        model: Digest of the generator's checkpoint, see `model_digest`.
        lengths: Video frames, 1 or more; the first is the image, through the autoencoder.
        samples: Videos per case.
        seed: Of index 0; index i has `seed` + i.

    ValueError for another seed, checkpoint, size, precision or cache than that of the videos in
    `out`; FolderInUse while another process works there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        _write_missing(generator, cases, out, model, lengths, samples, seed, log)


def _write_missing(
    generator: StreamingGenerator,
    cases: Sequence[Case],
    out: Path,
    model: str,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    log: Callable[[str], None],
) -> None:
    recorded = json.loads((out / SEEDS).read_text()) if (out / SEEDS).is_file() else {}
    where = placed(generator)
    cache, size, dtype = where["cache"], where["size"], where["dtype"]
    for name, key, ours, unsaid in (
        ("seed", "0", seed, seed),
        ("checkpoint", "model", model, model),
        ("size", "size", size, size),
        ("dtype", "dtype", dtype, dtype),
        ("cache", "cache", cache, MODEL if recorded else cache),
    ):
        if (theirs := recorded.get(key, unsaid)) != ours:
            raise ValueError(
                f"{name}: expected {theirs}, as for the videos in {out}, got {ours}; pass another "
                "folder as --out"
            )
    for length in lengths:
        (out / str(length)).mkdir(parents=True, exist_ok=True)
    seeds = {str(index): seed + index for index in range(samples)}
    facts = {"model": model, "size": size, "dtype": dtype}
    facts |= {} if cache == MODEL else {"cache": cache}
    write_json(out / SEEDS, recorded | seeds | facts)
    for case in cases:
        for index in range(samples):
            paths = {length: out / str(length) / f"{case.prompt}-{index}.mp4" for length in lengths}
            missing = {length: path for length, path in paths.items() if not path.is_file()}
            if missing:
                _write(generator, case, missing, seed + index)
                log(f"{case.prompt}-{index}")


def _write(generator: StreamingGenerator, case: Case, paths: dict[int, Path], seed: int) -> None:
    """Write one stream to a video per length."""
    height, width = generator.height, generator.width
    pixels, _ = fit_image(load_image(case.image), height, width)
    with contextlib.ExitStack() as files:
        writers = {}
        for length, path in paths.items():
            partial = files.enter_context(replacing(path))
            writer = Mp4Writer(str(partial), height, width, generator.fps, scale=1)
            writers[length] = files.enter_context(writer)
        stream = files.enter_context(generator.open(pixels, case.prompt, seed))
        frames = stream.first_frame
        while True:
            for length, writer in writers.items():
                writer.write(frames[: length - writer.frames])
            if all(writer.frames == length for length, writer in writers.items()):
                return
            frames = stream.step(generator.still())
