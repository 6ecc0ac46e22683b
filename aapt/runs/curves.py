"""Metrics of training runs as curves over updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..media.figures import COLOURS, LINES, new_figure, path_labels
from .monitor import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Mapping[str, float]]]

SMOOTHING = 0.04, 11  # width of the running mean: share of a curve's points, least points
GRADIENTS = "gradient norms"
LOGARITHMIC = (GRADIENTS, "penalties")
TOGETHER = {"generator": "losses", "discriminator": "losses", "r1": "penalties", "r2": "penalties"}


def read_runs(paths: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    """Read the metrics of several runs, named by the shortest ends of their paths that differ.

    A path is a file of metrics, a folder with such a file, or a folder of such folders. ValueError
    for any other path.
    """
    files = []
    for path in map(Path.absolute, paths):
        found = [path] if path.is_file() else sorted(path.glob(METRICS))
        if not found:
            stages = sorted(path.glob(f"*/{METRICS}"))
            # One whose first update is under way has none yet
            found = [stage for stage in stages if stage.stat().st_size] or stages
        if not found:
            raise ValueError(f"{path}: expected a folder or file of metrics, got none")
        files += found
    names = path_labels([path.parent if path.name == METRICS else path for path in files])
    return {name: read_metrics(path) for name, path in zip(names, files)}


def plot_metrics(runs: Runs) -> Figure:
    """Draw metrics over updates, as `monitor.read_metrics` reads them, of runs by name.

    Raw values are faint, under their running mean. If there are several runs, each has its colour,
    and the metrics of a panel differ by the style of their lines.
    """
    empty = [run for run, lines in runs.items() if not lines]
    if empty or not runs:
        raise ValueError(f"runs: expected at least one line of metrics, got none in {empty}")
    panels, several = metric_panels(runs), len(runs) > 1
    figure, axes = new_figure(len(panels), columns=3)
    for axis, (title, metrics) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        if title in LOGARITHMIC:
            axis.set_yscale("log")
        for (number, run), (index, metric) in product(enumerate(runs), enumerate(metrics)):
            rows = [row for row in runs[run] if metric in row]
            if not rows:
                continue
            colour = COLOURS[(number if several else index) % len(COLOURS)]
            line = LINES[index % len(LINES)] if several else "-"
            label = ": ".join([run] * several + [metric] * (len(metrics) > 1))
            steps = [row["step"] for row in rows]
            values = np.array([row[metric] for row in rows])
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            axis.plot(steps, running_mean(values), line, color=colour, linewidth=1.6, label=label)
        if several or len(metrics) > 1:
            axis.legend(fontsize=7, frameon=False)
    if not several:
        figure.suptitle(next(iter(runs)), fontsize=11)
    return figure


def metric_panels(runs: Runs) -> dict[str, list[str]]:
    """Group metrics into panels: losses first, then gradient norms, then the others."""
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
    """Mean of the finite values around each value; `SMOOTHING` sets its width."""
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
