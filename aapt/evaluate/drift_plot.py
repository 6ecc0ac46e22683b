"""A figure of the drift: an evaluation's metrics over time, one line per checkpoint."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING

from ..media.figures import COLOURS, MUTED, new_figure
from .report import Report
from .scenes import TRUTH
from .windows import WINDOWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("latent_deviation", "latent deviation"),
    ("latent_offset", "latent offset (RMS of channel means)"),
    ("sharpness", "sharpness, relative to the truth"),
    ("edge_sharpness", "edge sharpness, relative to the truth"),
    ("seam", "seam of cells (1: none)"),
    ("palette_error", "palette error"),
    ("feature_distance", "feature distance, in real deviations"),
)
AXES = (("yaw", "yaw_correlation", "-", "o"), ("forward", "forward_correlation", ":", "s"))


def plot_drift(report: Report) -> Figure:
    """Draw panels of metrics over the seconds of video.

    The truth is grey; dotted lines show the values by chance. The panel of controls is drawn only
    if a probe has read the motion.
    """
    figure, axes = new_figure(len(PANELS) + (report.probe is not None), columns=3)
    colours = {TRUTH: MUTED, **dict(zip(report.checkpoints, cycle(COLOURS)))}
    for axis, (metric, title) in zip(axes, PANELS):
        axis.set_title(title, fontsize=10)
        for source, line in report.timelines.items():
            values = [math.nan if v is None else v for v in getattr(line, metric)]
            style = "--" if source == TRUTH else "-"
            marker = "o" if len(values) == 1 else None
            axis.plot(
                line.seconds, values, style, color=colours[source], marker=marker, label=source
            )
        if metric == "palette_error":
            _chance(axis, report.same_theme, "another place of the theme")
            _chance(axis, report.other_theme, "another theme")
        axis.set_ylim(bottom=0)
    if report.probe is not None:
        _controls(axes[-1], report, colours)
    for axis in axes:
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds of video", fontsize=8)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure


def _chance(axis: Axes, height: float | None, label: str) -> None:
    """Draw a dotted line at the height that chance gives, if it is known."""
    if height is not None:
        axis.axhline(height, color=MUTED, linestyle=":", linewidth=1)
        place = axis.get_yaxis_transform()  # from edge to edge across, data units upwards
        axis.text(0.99, height, label, transform=place, ha="right", va="bottom", fontsize=7)


def _controls(axis: Axes, report: Report, colours: dict[str, str]) -> None:
    """Draw the correlation of commanded and realised motion at the middle of each window."""
    axis.set_title("controls followed (correlation)", fontsize=10)
    windows = [window for window in WINDOWS if window.name in report.windows]
    middles = [window.middle for window in windows]
    for name, field, line, marker in AXES:
        style = {"linestyle": line, "marker": marker, "markersize": 3.5, "linewidth": 1.2}
        for source in report.timelines:
            found = [getattr(report.windows[window.name][source], field) for window in windows]
            values = [math.nan if value is None else value for value in found]
            axis.plot(middles, values, color=colours[source], **style)
        axis.plot([], [], color=MUTED, label=name, **style)
    axis.set_ylim(top=1.02)
    axis.legend(fontsize=7, frameon=False, loc="lower left")
