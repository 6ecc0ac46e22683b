"""`aapt encode`: make shards of latents from videos."""

import json
import math
import os
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ..placement import named_dtype
from .shared import (
    MAX_THREADS,
    MODEL,
    RESUMES,
    Interrupted,
    Json,
    OutputError,
    bad_input,
    check_inputs,
    check_out_folder,
    check_seconds,
    ctrl_c,
    say,
    table,
)

PRECISIONS = ("float32", "bfloat16")
MAX_FPS = 240


def encode(
    videos: Annotated[
        Path, typer.Argument(help="A folder of videos or tar shards, a .tar, or a video.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="The folder for shards of latents."),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER",
            help="The VAE's model: bundled, a checkpoint, or a VAE alone such as Wan 2.1's.",
        ),
    ] = MODEL,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH[+WxH...]",
            help="A size of clips, or several for each video; may be repeated.",
            show_default="the model's",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a clip.")] = 5.0,
    stride: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds from one clip's start to the next.",
            show_default="a clip's length",
        ),
    ] = None,
    motion: Annotated[
        str, typer.Option(metavar="KIND", help="Motion read beside a video: none, camera or pose.")
    ] = "none",
    fps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_FPS,
            help="Video frames per second of clips.",
            show_default="the model's; 24 for a VAE alone",
        ),
    ] = None,
    max_move: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="Drop clips whose camera moves further in a frame."),
    ] = 0.5,
    max_turn: Annotated[
        float,
        typer.Option(
            metavar="DEGREES", min=0, help="Drop clips whose camera turns further in a frame."
        ),
    ] = 15.0,
    min_score: Annotated[
        float, typer.Option(metavar="P", help="Keypoints below this score are not drawn.")
    ] = 0.3,
    shard_clips: Annotated[int, typer.Option(metavar="N", min=1, help="Clips in a shard.")] = 256,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_THREADS, help="Threads that decode videos.")
    ] = 2,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="The VAE's device: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=f"The VAE's precision: {' or '.join(PRECISIONS)}.",
            show_default="bfloat16 on CUDA, else float32",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also store UMT5's embeddings of the captions: the folder of a Wan pipeline.",
        ),
    ] = None,
    text_device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="The text encoder's device.", show_default="as --device"
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Encode part I of N, from 0; the last part joins all.",
            show_default="torchrun's rank, else all videos",
        ),
    ] = None,
    as_json: Json = False,
):
    """Encode videos into shards of latents to train on.

    Beside NAME.mp4 (or any container that FFmpeg reads) stands its caption: NAME.txt, or NAME.json
    with "caption" or "captions". Camera motion is read from NAME.camera.txt (RealEstate10K), pose
    motion from NAME.keypoints.json (COCO-WholeBody). Clips have 1 + 4 * round(seconds * fps / 4)
    frames. A video that cannot be used is skipped and counted, and FOLDER/videos.jsonl
    says why. After an interruption the same command resumes and makes the same bytes.

    \b
    Examples:
      aapt encode videos/ --out latents/
      aapt encode shards/ --bucket 736x416 --bucket 416x736 --model mine/ --out latents/
      aapt encode videos/ --bucket 736x416+1280x720+640x352 --model Wan2.1/vae --seconds 15 \\
        --device cuda --out latents/
      aapt encode realestate/ --motion camera --stride 2.5 --device cuda --out latents/
      aapt encode videos/ --model Wan2.1/vae --text Wan2.1 --bucket 832x480 --fps 16 --out latents/
      torchrun --nproc-per-node 8 -m aapt encode videos/ --device cuda --out latents/
    """
    from ..data.videos import encode as job
    from ..data.videos.buckets import Bucket
    from ..data.videos.clip_reader import CutConfig
    from ..data.videos.parts import Part
    from ..data.videos.shard_folder import JOURNAL
    from ..device import usable_device, usable_dtype
    from ..model.umt5 import UMT5Weights

    with bad_input():
        check_inputs(videos=videos)
        check_out_folder(out)
        vae, size, usual, patch = _autoencoder(model)
        fps = fps or usual
        if size is None and not bucket:
            raise ValueError(
                f"bucket: expected one or more, got none; {model} is a VAE alone, pass --bucket WxH"
            )
        granularity, per_latent = vae.config.space_factor * patch, vae.config.time_factor
        check_seconds("seconds", seconds)
        check_seconds("stride", seconds if stride is None else stride)
        latent_frames = max(1, round(seconds * fps / per_latent))
        clip = 1 + per_latent * latent_frames
        config = CutConfig(
            buckets=tuple(Bucket.parse_family(family, granularity) for family in bucket or [size]),
            latent_frames=latent_frames,
            stride=clip if stride is None else max(1, round(stride * fps)),
            fps=fps,
            frames_per_latent=per_latent,
            motion=motion,
            max_move=max_move,
            max_turn=math.radians(max_turn),
            min_score=min_score,
        )
        rank = _rank()
        if text_device and text is None:
            raise ValueError("text_device: expected with --text only; add --text")
        if rank and device == "cuda":
            device = f"cuda:{rank.local}"
        place = usable_device(device)
        vae.to(place)
        part = Part.parse(shard) if shard else rank and Part(rank.number, rank.count)
        precision = usable_dtype(named_dtype(dtype, PRECISIONS), place)
        options = {"shard_clips": shard_clips, "workers": workers, "report": say}
        options |= {"dtype": precision, "part": part}
        if text is not None:
            options["text"] = UMT5Weights(text, usable_device(text_device or device))
        try:
            with ctrl_c() as interrupted:
                index = job.encode(
                    videos, vae, out, config, stop=lambda: bool(interrupted), **options
                )
        except job.EncodeError as error:
            raise OutputError(f"{error}; {RESUMES}") from None
        except KeyboardInterrupt:  # the second
            raise Interrupted(RESUMES) from None
    if as_json:
        print(json.dumps(index, indent=2))
    else:
        table(job.summary(index))
    if not index["complete"]:
        raise Interrupted(RESUMES)
    if not index["buckets"] and part is None:
        raise OutputError(f"{videos}: no clip could be used; {out / JOURNAL} says why")


class Rank(NamedTuple):
    """A process of torchrun."""

    number: int
    count: int
    local: int  # on its machine


def _rank() -> Rank | None:
    """Return this process's rank, None unless torchrun started several."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return None
    return Rank(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", 0)))


def _autoencoder(model: str):
    """Return a model's VAE, its size such as "128x80", frames per second, and patch: the latent
    pixels of which both sides of a latent frame are a multiple.

    For a VAE that stands alone, the size is None, and the paper's numbers take the place of the
    model's.
    """
    from ..checkpoint import find_checkpoint, load_config, reading_config, tuples
    from ..clock import FPS
    from ..model.config import ModelConfig
    from ..vae.folder import is_foreign, load_vae

    vae = load_vae(model)
    if is_foreign(model):
        return vae, None, FPS, ModelConfig.patch
    folder = find_checkpoint(model)
    config = load_config(folder)
    if "model" not in config:
        return vae, None, FPS, ModelConfig.patch
    with reading_config(folder):
        patch = math.lcm(*ModelConfig(**tuples(config["model"])).patch_shape)
        return vae, f"{config['width']}x{config['height']}", config["fps"], patch
