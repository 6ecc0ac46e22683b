"""`aapt eval`, `aapt compare` and `aapt eval-vae`: measure a model, several, or its decoders."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..placement import placement
from .shared import (
    Cache,
    Device,
    Dtype,
    Json,
    OutputError,
    Size,
    Threads,
    bad_input,
    check_inputs,
    check_out_folder,
    check_seconds,
    printed_at_once,
    reason,
    say,
    table,
)

MAX_CLIPS = 100_000
MAX_SEED = 2**43 - 1  # noise of start i is seeded by 2**20 times the seed, and i, in 64 bits

Latents = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Encoded clips to start from.", show_default="held-out worlds"
    ),
]
Videos = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Starts of which whole videos are saved, as MP4 files."),
]
Seconds = Annotated[float, typer.Option(metavar="S", help="Length of each video.")]


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or a bundled model.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for the report.")
    ],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FOLDER", help="To compare with; may be repeated.", show_default=False
        ),
    ] = None,
    latents: Latents = None,
    starts: Annotated[
        int, typer.Option(metavar="N", help="Worlds or clips; six worlds show every theme.")
    ] = 16,
    seconds: Seconds = 60.0,
    seed: Annotated[
        int, typer.Option(metavar="N", max=MAX_SEED, help="Of worlds, walks, clips and noise.")
    ] = 0,
    videos: Videos = 3,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    cache: Cache = "model",
    fid: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TorchScript network of frames for FID."),
    ] = None,
    fvd: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TorchScript network of clips for FVD.")
    ] = None,
    keypoints: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TorchScript detector of people's keypoints, for AKD."),
    ] = None,
    camera_poses: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TorchScript estimator of cameras, for Rot and Trans."),
    ] = None,
    as_json: Json = False,
):
    """Measure a model on long videos of worlds or clips that no training has seen.

    In windows of time it measures sharpness, palette, distance in feature space, PSNR, and how
    closely the camera follows its controls, all against the rendered truth; at every second, drift.
    The folder gets report.json, drift.png and sheet.png, and in videos/ the rollouts and the truth
    of the first starts. A probe that reads camera motion is trained the first time, and kept in the
    user's cache.

    A model that follows poses, such as tiny-puppet, is measured on rendered figures: the distance
    of detected from commanded keypoints (AKD), and whether look and place are kept. The detector is
    trained and kept like the probe.

    A model that does not move as the bundled world does is measured on clips of `aapt encode`, of
    its size and its autoencoder. Clips give the first frames, captions and motion, which is
    repeated when a clip ends; the truth is the clip as the autoencoder decodes it. After a clip's
    end, its last frames serve as the truth, and frames are not compared one by one. Themes and
    controls are left out.

    A diffusion checkpoint is rolled out with the steps and the guidance of its config.json.

    \b
    Examples:
      aapt eval tiny-world --out evaluation
      aapt eval runs/tiny-world/tiny-world --baseline tiny-world --seconds 30 --out compared
      aapt eval tiny-world --seed 1 --json --out second > second.json
      aapt eval tiny-world --fvd i3d_torchscript.pt --out fvd
      aapt eval runs/paper-8b/paper-8b --latents held-out/ --starts 4 --device cuda --out clips
    """
    from ..evaluate import evaluate
    from ..media.figures import MissingLibrary

    checkpoints = [checkpoint, *(baseline or [])]
    settings = dict(latents=latents, starts=starts, seconds=seconds, seed=seed, videos=videos)
    networks = dict(fid=fid, fvd=fvd, keypoints=keypoints, camera_poses=camera_poses)
    settings |= networks | {"cache": cache}
    with bad_input():
        settings |= placement(device, dtype, size)
        check_seconds("seconds", seconds)
        check_inputs(latents=latents, **networks)
        check_out_folder(out)
        try:
            report = evaluate(checkpoints, out, **settings, log=say)
        except MissingLibrary as error:
            raise OutputError(str(error)) from None
        except OSError as error:
            raise OutputError(reason(error)) from None
    if as_json:
        print(report.as_json())
        return
    with printed_at_once():
        Console(width=None if sys.stdout.isatty() else 240).print(report.table())


def compare(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Two or more checkpoint folders or bundled models.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for all reports.")
    ],
    seed: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=0, max=MAX_SEED, help="May be repeated.", show_default="0 1 2"
        ),
    ] = None,
    latents: Latents = None,
    starts: Annotated[int, typer.Option(metavar="N", help="Worlds or clips per seed.")] = 16,
    seconds: Seconds = 60.0,
    videos: Videos = 1,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    cache: Cache = "model",
    as_json: Json = False,
):
    """Compare checkpoints with the first one, over several seeds, with 95 % confidence intervals.

    Each seed is one `aapt eval` of all checkpoints, in a folder of its own, with videos. The same
    command resumes: a report that is there is not made again. A star marks a measure that differs
    from the first checkpoint's: seed by seed, because checkpoints of one seed share worlds, walks
    and noise. One measure in twenty gets a star by chance.

    \b
    Examples:
      aapt compare tiny-world runs/tiny-world/tiny-world --out compared
      aapt compare tiny-world runs/a/a runs/b/b --seed 0 --seed 1 --seed 2 --seed 3 --out four
    """
    from ..evaluate.compare import compare
    from ..media.figures import MissingLibrary

    settings = dict(latents=latents, starts=starts, seconds=seconds, videos=videos, cache=cache)
    with bad_input():
        settings |= placement(device, dtype, size)
        check_seconds("seconds", seconds)
        check_inputs(latents=latents)
        check_out_folder(out)
        try:
            found = compare(checkpoints, out, seed or (0, 1, 2), **settings, log=say)
        except MissingLibrary as error:
            raise OutputError(str(error)) from None
        except OSError as error:
            raise OutputError(reason(error)) from None
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    with printed_at_once():
        Console(width=None if sys.stdout.isatty() else 240).print(found.table())


def evaluate_vae(
    checkpoint: Annotated[
        str, typer.Argument(help="A bundled model or a checkpoint folder with an autoencoder.")
    ],
    videos: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Videos to cut clips from.", show_default="held-out worlds"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size of clips.", show_default="the model's"),
    ] = None,
    clips: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_CLIPS, help="Number of clips.")
    ] = 24,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a clip.")] = 2.0,
    seed: Annotated[int, typer.Option(metavar="N", max=MAX_SEED, help="Of held-out worlds.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
):
    """Measure a decoder, beside the original one if it is light: PSNR, SSIM, flicker, sharpness,
    seam, time.

    Both decode the same latents of clips that neither has seen. To be timed they alternate, one
    latent frame after the other.

    \b
    Examples:
      aapt eval-vae tiny-world
      aapt eval-vae runs/vae-light/vae-light --threads 1 --json > decoders.json
      aapt eval-vae runs/wan-light/wan-light --videos held-out/ --size 480x256
      aapt eval-vae runs/vae-fine/vae-fine
    """
    import torch

    from ..data.videos.buckets import Bucket
    from ..environment import environment
    from ..evaluate.decoders import compare_decoders
    from ..evaluate.report import shown
    from ..media.figures import MissingLibrary

    if threads:
        torch.set_num_threads(threads)
    with bad_input():
        bucket = Bucket.parse(size) if size else None
        check_seconds("seconds", seconds)
        check_inputs(videos=videos)
        given = dict(videos=videos, size=bucket, clips=clips, seconds=seconds, seed=seed)
        try:
            report = compare_decoders(checkpoint, **given, log=say)
        except MissingLibrary as error:
            raise OutputError(str(error)) from None
    if as_json:
        print(json.dumps(report | environment(), indent=2))
        return
    rows = [("clips", f"{report['clips']} of {report['frames']} frames, {report['size']}")]
    rows += [
        (
            name,
            f"{r['psnr']:.2f} dB, SSIM {r['ssim']:.4f}, flicker {r['flicker']:.5f}, sharpness "
            f"{r['sharpness']:.4f}, seam {shown(r['seam'], '{:.2f}')}, edge sharpness "
            f"{shown(r['edge_sharpness'], '{:.2f}')}, {r['step_ms']:.1f} ms, "
            f"{r['parameters'] / 1e6:.2f} M",
        )
        for name, r in report["decoders"].items()
    ]
    seam = shown(report["seam"], "{:.2f}")
    rows.append(("truth", f"sharpness {report['sharpness']:.4f}, seam {seam}"))
    speed = f"{report['threads']} threads"
    if report["speedup"] is not None:
        rows.append(("agreement", f"{report['agreement']:.2f} dB"))
        speed = f"{report['speedup']:.2f} x, {speed}"
    rows.append(("speed", speed))
    table(rows)
