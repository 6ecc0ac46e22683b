"""Figures of curves: the look that all share, and the names of their lines."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people who confuse colours tell apart (Wong, Nature Methods 2011).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MUTED = "#6b6b6b"
PANEL_INCHES = 4.6, 2.7


class MissingLibrary(ImportError):
    """Says which library, needed by some commands only, is not installed."""


def new_figure(panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Make an empty figure with a grid of panels. MissingLibrary without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingLibrary(
            "matplotlib: expected to be installed, for figures; pip install 'aapt[train]'"
        ) from None
    columns = min(panels, columns)
    rows = math.ceil(panels / columns)
    width, height = PANEL_INCHES
    figure = Figure((width * columns, height * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes[:panels]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the suffix of the path."""
    figure.savefig(path, dpi=130, format="png")


def path_labels(paths: Sequence[str | Path], taken: Sequence[str] = ()) -> list[str]:
    """Name each path by its end: the shortest that differs for all and is none of `taken`.

    ValueError if two paths are the same, or if there is none.
    """
    paths = [Path(os.path.normpath(path)) for path in paths]
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = [Path(*path.parts[-length:]).as_posix() for path in paths]
        if len({*names, *taken}) == len(names) + len(taken):
            return names
    raise ValueError(f"expected different paths, got {', '.join(map(str, paths)) or 'none'}")
