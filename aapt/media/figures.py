"""Figures of curves: the look that all of them share, and what their lines are called."""

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
    """A library that only some commands need is not installed."""


def new_figure(panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """An empty figure with a grid of panels. MissingLibrary without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingLibrary(
            "matplotlib: expected to be installed, which figures need: pip install 'aapt[train]'"
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
    """Write a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=130, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def path_labels(paths: Sequence[str | Path], taken: Sequence[str] = ()) -> list[str]:
    """The shortest ends of paths that tell them apart, from each other and from names `taken`."""
    paths = [Path(os.path.normpath(path)) for path in paths]
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = [Path(*path.parts[-length:]).as_posix() for path in paths]
        if len({*names, *taken}) == len(names) + len(taken):
            return names
    raise ValueError(f"expected different paths, got {', '.join(map(str, paths)) or 'none'}")
