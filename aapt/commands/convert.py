"""`aapt convert`: make a checkpoint of another project's model."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .shared import InputError, Json, OutputError, check_inputs, check_out_folder, reason, table

LISTED_TIMES = 8  # of sampling; of more than these the table says the ends


def convert(
    source: Annotated[
        Path, typer.Argument(help="A .pt or .safetensors file, an index of shards, or a folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for the checkpoint.")
    ],
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="What the weights are, one of the kinds above.")
    ],
    lora: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A low-rank adaptation to add.", show_default="none"),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="The autoencoder, which making video needs and training does not.",
            show_default="none",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The folder of UMT5, such as a Wan pipeline's; the checkpoint keeps its path.",
            show_default="none",
        ),
    ] = None,
    recycle: Annotated[
        Literal["zero", "random"] | None,
        typer.Option(
            help="Add input channels for the frame before, to train a model of one pass from.",
            show_default="none",
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The network in a .pt file that holds several.",
            show_default="the kind's",
        ),
    ] = None,
    as_json: Json = False,
):
    """Convert a Wan transformer of another project into a checkpoint.

    Nothing is downloaded. A diffusers pipeline's folder is read for its transformer. Sizes come
    from the tensors; chunks, steps and windows, which no file holds, come from the kind. Tensors
    are converted one at a time and keep their precision. The last line is the weights' licence.

    \b
    Kinds that make video:
      causal-forcing-framewise        causal-forcing-framewise-2step
      causal-forcing-framewise-1step  causal-forcing-chunkwise
      causal-forcing-framewise-diffusion  causal-forcing-chunkwise-diffusion
      causal-forcing-longvideo  rolling-forcing
      one-forcing  self-forcing  causvid  longlive-1.3b  longlive-2-5b

    \b
    Kinds to start training from:
      wan2.1-t2v  wan2.2-ti2v-5b

    \b
    Examples:
      aapt convert cf/causal-forcing++/framewise-1step.pt --kind causal-forcing-framewise-1step \\
        --vae Wan2.1/vae --text Wan2.1 --out cf-1step
      aapt convert ll/longlive_base.pt --kind longlive-1.3b --lora ll/lora.pt --vae Wan2.1/vae \\
        --text Wan2.1 --out longlive
      aapt convert Wan2.1/transformer --kind wan2.1-t2v --recycle zero --out wan-start
    """
    from ..convert.job import convert as job

    try:
        check_inputs(source=source, lora=lora, vae=vae, text=text)
        check_out_folder(out)
        options = {"lora": lora, "vae": vae, "text": text, "recycle": recycle, "entry": entry}
        written = job(source, out, kind, **options)
    except OSError as error:
        raise OutputError(reason(error)) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    if as_json:
        print(json.dumps(written, indent=2))
    else:
        table(_rows(out, written))


def _rows(out: Path, written: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a converted checkpoint is, as rows of a table."""
    model, origin = written["model"], written["converted"]
    sink, window = model["sink_frames"], model["window_frames"]
    past = f"{_frames(window)} before the newest"
    if sink:
        first = "latent frame" if sink == 1 else _frames(sink)
        past = f"the first {first}, and {window} before the newest"
    rows = [
        ("checkpoint", str(out)),
        ("kind", f"{origin['kind']}: {origin['weights']}"),
        ("settings", origin["settings"]),
        (
            "model",
            f"{model['depth']} blocks of width {model['width']}, {model['heads']} heads, "
            f"{model['latent_channels']} latent channels",
        ),
        ("chunk", _frames(model["chunk"])),
        ("past", past),
        ("sampling", _sampling(written.get("sampling"))),
    ]
    if "vae" not in written:
        rows.append(("autoencoder", "none; pass --vae to make video"))
    if "text" not in written:
        rows.append(("text encoder", "none; pass --text to make video"))
    return [*rows, ("licence of the weights", origin["licence"])]


def _frames(count: int) -> str:
    return f"{count} latent frame{'' if count == 1 else 's'}"


def _sampling(sampling: dict[str, Any] | None) -> str:
    if sampling is None:
        return "none before training: one pass a frame, recycled"
    if "times" not in sampling:
        return f"diffusion in {sampling['steps']} steps, to start training from"
    times, first = sampling["times"], sampling["first_times"]
    passes = "a pass" if len(times) == 1 else "passes"
    listed = ", ".join(f"{time:.4g}" for time in times)
    if len(times) > LISTED_TIMES:
        passes, listed = f"{len(times)} passes", f"{times[0]:.4g} to {times[-1]:.4g}"
    solver = " of UniPC" if sampling["solver"] == "unipc" else ""
    refresh = "" if sampling["refresh"] is None else f", and one at {sampling['refresh']:g}"
    opening = "" if first is None else f"; {len(first)} in the first chunk"
    opening += "; several chunks in a pass" if sampling["rolling"] else ""
    guidance = "" if sampling["guidance"] == 1 else f"; guidance {sampling['guidance']:g}"
    return f"{passes}{solver} at {listed}{refresh}{opening}{guidance}"
