"""Figures of curves: the look that all of them share, and the metrics of training runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people who confuse colours tell apart (Wong, Nature Methods 2011).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MUTED = "#6b6b6b"
PANEL_INCHES = 4.6, 2.7
SMOOTHING = 0.04, 11  # the mean over a curve: share of its points, and how many at least
GRADIENTS = "gradient norms"
LOGARITHMIC = (GRADIENTS, "penalties")
TOGETHER = {"generator": "losses", "discriminator": "losses", "r1": "penalties", "r2": "penalties"}


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


def plot_metrics(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Metrics over updates, as `monitor.read_metrics` reads them, of one run or several by name.

    Raw values are faint, a running mean lies over them. Of several runs each has its colour, and
    the metrics that share a panel differ in line.
    """
    empty = [run for run, lines in runs.items() if not lines]
    if empty or not runs:
        raise ValueError(f"runs: expected a line of metrics at least, got none in {empty}")
    panels = metric_panels(runs)
    figure, axes = new_figure(len(panels), columns=3)
    for axis, (title, metrics) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        if title in LOGARITHMIC:
            axis.set_yscale("log")
        for number, run in enumerate(runs):
            for index, metric in enumerate(metrics):
                rows = [row for row in runs[run] if metric in row]
                colour = COLOURS[(number if len(runs) > 1 else index) % len(COLOURS)]
                line = LINES[index % len(LINES)] if len(runs) > 1 else "-"
                names = [run] * (len(runs) > 1) + [metric] * (len(metrics) > 1)
                steps = [row["step"] for row in rows]
                values = np.array([row[metric] for row in rows])
                axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
                mean, label = running_mean(values), ": ".join(names)
                axis.plot(steps, mean, line, color=colour, linewidth=1.6, label=label)
        if len(runs) > 1 or len(metrics) > 1:
            axis.legend(fontsize=7, frameon=False)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), fontsize=11)
    return figure


def metric_panels(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[str]]:
    """The metrics of each panel: losses together, then gradient norms, then the others."""
    names = dict.fromkeys(name for lines in runs.values() for row in lines for name in row)
    panels: dict[str, list[str]] = {"losses": [], GRADIENTS: []}
    for name in names:
        if name in ("step", "seconds"):
            continue
        panel = TOGETHER.get(name, name)
        if "loss" in name:
            panel = "losses"
        elif "gradient" in name:
            panel = GRADIENTS
        panels.setdefault(panel, []).append(name)
    return {panel: metrics for panel, metrics in panels.items() if metrics}


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, as `SMOOTHING` says; numbers that are not finite
    do not count."""
    share, least = SMOOTHING
    half = max(least, round(share * len(values))) // 2
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.clip(np.arange(len(values)) - half, 0, None)
    last = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    count = counts[last] - counts[first]
    mean = (sums[last] - sums[first]) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)
