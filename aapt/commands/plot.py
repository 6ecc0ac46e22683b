"""`aapt plot`: curves of what training has measured."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import bad_input, say


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of a stage or a recipe, or metrics.jsonl."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", help="Where the picture goes.")
    ],
):
    """Draw what training has measured: losses, gradient norms and the rest, over updates.

    Several runs lie over one another, named by their folders. The folder of a recipe stands for
    all of its stages.

    \b
    Examples:
      aapt plot runs/tiny-world/adversarial --out adversarial.png
      aapt plot runs/first/adversarial runs/second/adversarial --out both.png
    """
    from ..media.figures import MissingLibrary, save_figure
    from ..runs.curves import plot_metrics, read_runs

    with bad_input():
        if out.suffix != ".png":
            raise ValueError(f"out: expected a .png file, got {out}")
        try:
            save_figure(plot_metrics(read_runs(runs)), out)
        except (MissingLibrary, OSError) as error:
            say(f"aapt: {error}")
            raise typer.Exit(1) from None
