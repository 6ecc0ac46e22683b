"""`aapt vbench`: write the videos that VBench-I2V measures."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import (
    MAX_SEED,
    RESUMES,
    Cache,
    Device,
    Dtype,
    Interrupted,
    OutputError,
    Size,
    bad_input,
    check_inputs,
    check_out_folder,
    load,
    reason,
    say,
)

MAX_FRAMES = 1_000_000
MAX_SAMPLES = 1000


def vbench(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or a bundled model.")],
    images: Annotated[
        Path, typer.Option(metavar="FOLDER", help="VBench's images, such as crop/16-9.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for the videos.")
    ],
    info: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="vbench2_i2v_full_info.json.",
            show_default="images are named by their prompts",
        ),
    ] = None,
    frames: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_FRAMES,
            help="Length of a video; may be repeated.",
            show_default="120 and 1440",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_SAMPLES, help="Videos per image.")
    ] = 5,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=MAX_SEED - MAX_SAMPLES, help="Of sample 0.")
    ] = 0,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    cache: Cache = "model",
):
    """Write the videos that VBench-I2V reads: FOLDER/120/PROMPT-0.mp4 and so on.

    VBench itself measures them: give each folder of a length to its evaluation. Images are
    cropped around their centre to the model's size, so choose VBench's crop that is nearest to it.
    A shorter video is the beginning of the longer one of its number. Nothing steers a model that
    takes controls. The same command resumes; one with another checkpoint, seed or cache is
    rejected.

    \b
    Examples:
      aapt vbench runs/paper-8b/paper-8b --images crop/16-9 --info vbench2_i2v_full_info.json \\
        --device cuda --out videos
      aapt vbench tiny-world --images images/ --frames 120 --samples 1 --out short
    """
    from ..checkpoint import find_checkpoint
    from ..evaluate.vbench import LENGTHS, read_cases, write_videos
    from ..streaming.actions import model_digest

    with bad_input():
        check_inputs(images=images, info=info)
        check_out_folder(out)
        cases = read_cases(images, info)
    generator = load(checkpoint, device, dtype, size, cache=cache)
    lengths = dict.fromkeys(frames or LENGTHS)
    with bad_input():
        try:
            given = {"lengths": list(lengths), "samples": samples, "seed": seed, "log": say}
            model = model_digest(find_checkpoint(checkpoint))
            write_videos(generator, cases, out, model=model, **given)
        except OSError as error:
            raise OutputError(reason(error)) from None
        except KeyboardInterrupt:
            raise Interrupted(RESUMES) from None
