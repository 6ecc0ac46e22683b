"""`aapt plot`: draw the metrics of training."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import OutputError, bad_input, check_inputs, check_out_folder, reason


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of a stage or a recipe, or metrics.jsonl."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", help="The image to write.")
    ],
):
    """Draw the metrics of training over updates: losses, gradient norms and the rest.

    Curves of several runs share the panels and are named by their folders. For a recipe's folder,
    each of its stages is a run.

    \b
    Examples:
      aapt plot runs/tiny-world/adversarial --out adversarial.png
      aapt plot runs/first/adversarial runs/second/adversarial --out both.png
    """
    from ..checkpoint import replacing
    from ..media.figures import MissingLibrary, save_figure
    from ..runs.curves import plot_metrics, read_runs

    with bad_input():
        if out.suffix != ".png":
            raise ValueError(f"out: expected a .png file, got {out}")
        check_out_folder(out.parent)
        for path in runs:
            check_inputs(runs=path)
        try:
            figure = plot_metrics(read_runs(runs))
        except MissingLibrary as error:
            raise OutputError(str(error)) from None
    try:
        with replacing(out) as partial:
            save_figure(figure, partial)
    except OSError as error:
        raise OutputError(reason(error, str(out))) from None
