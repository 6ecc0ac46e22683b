"""`aapt quantise`: round a checkpoint's linear layers to 8 bits."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .shared import MODEL, InputError, Json, OutputError, check_out_folder, reason, table


def quantise(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for the checkpoint.")
    ],
    source: Annotated[
        str, typer.Argument(metavar="[NAME|FOLDER]", help="A bundled model or a checkpoint.")
    ] = MODEL,
    as_json: Json = False,
):
    """Write a checkpoint with the linear layers of its blocks in 8 bits (e4m3 with scales).

    It takes half the memory of bfloat16, and on an H100 or H200 its products run on the FP8 tensor
    cores; elsewhere they give the same numbers without more speed. All commands take the new
    folder as they take the old one, apart from training. Weights are rounded one at a time.

    \b
    Examples:
      aapt quantise --out tiny-fp8
      aapt quantise runs/mine/mine --out mine-fp8
      aapt bench stream --model mine-fp8
    """
    from ..convert.quantise import quantise as job

    try:
        check_out_folder(out)
        done = job(source, out)
    except OSError as error:
        raise OutputError(reason(error)) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    if as_json:
        print(json.dumps(done, indent=2))
        return
    worst = max(done["errors"], key=done["errors"].get)
    table(
        [
            ("checkpoint", str(out)),
            ("rounded", f"{done['layers']} layers, {done['weights'] / 1e6:.1f} M weights"),
            ("file", f"{done['bytes'] / 1e6:.1f} MB, before {done['bytes_before'] / 1e6:.1f} MB"),
            ("worst layer", f"{worst}: relative error {done['errors'][worst]:.1%}"),
        ]
    )
