"""The results of an evaluation: as numbers for programs and as a table for people."""

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .kept_objects import KeptObjects
from .measure import Measurement, Timeline
from .motion_probe import ProbeQuality
from .object_detector import DetectorQuality

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("latent std", "latent_deviation", "{:.3f}"),
    ("sharpness", "sharpness", "{:.2f}"),
    ("edge sharpness", "edge_sharpness", "{:.2f}"),
    ("seam", "seam", "{:.2f}"),
    ("flicker", "flicker", "{:.2f}"),
    ("palette error", "palette_error", "{:.3f}"),
    ("theme kept", "theme_kept", "{:.0%}"),
    ("feature distance", "feature_distance", "{:.2f}"),
    ("PSNR dB", "psnr", "{:.1f}"),
    ("yaw corr", "yaw_correlation", "{:.3f}"),
    ("forward corr", "forward_correlation", "{:.3f}"),
    ("yaw gain", "yaw_gain", "{:.2f}"),
    ("forward gain", "forward_gain", "{:.2f}"),
    ("yaw response", "yaw_response", "{:.0f}"),
    ("forward response", "forward_response", "{:.0f}"),
    ("AKD to pose px", "akd_to_pose", "{:.2f}"),
    ("look kept", "look_kept", "{:.0%}"),
    ("FID", "fid", "{:.1f}"),
    ("FVD", "fvd", "{:.1f}"),
    ("AKD to truth px", "akd_to_truth", "{:.2f}"),
    ("keypoints missing", "missing_keypoints", "{:.0%}"),
    ("Rot", "rotation_error", "{:.3f}"),
    ("Trans", "translation_error", "{:.3f}"),
    ("cameras found", "cameras_found", "{:.0%}"),
)


@dataclass(frozen=True)
class Report:
    """Measurements of every source of videos in every window, and what to compare them with.

    Attributes:
        checkpoints: Path or name of each checkpoint, by source.
        digests: `model_digest` of each checkpoint, by source.
        settings: Starts, seconds, seed, device, precision, size, cache, and the files and folders
            that were given.
        windows: By window, then by source (truth, autoencoder of the first, checkpoints).
        timelines: By source: the truth up to its end, and every checkpoint.
        seconds_taken: Wall time of each part of the work.
        environment: Versions and hardware.
        truth: The kind of truth, in words.
        same_theme, other_theme: Palette error between real videos of two places of one theme, and
            of two themes. A generator that forgot only the place has the first error, one that
            forgot the theme has the second.
        probe: Quality of the motion probe on held-out rendered clips.
        detector_distance: AKD of the keypoint detector on held-out rendered figures, in pixels: the
            least that a generator can be seen to have.
        objects: Object persistence after some seconds, by moment, then by source.
        object_detector: Quality of the object detector on held-out rendered pictures.

    The last six are None where they do not apply, as for clips.
    """

    checkpoints: dict[str, str]
    digests: dict[str, str]
    settings: dict[str, Any]
    windows: dict[str, dict[str, Measurement]]
    timelines: dict[str, Timeline]
    seconds_taken: dict[str, float]
    environment: dict[str, Any]
    truth: str
    same_theme: float | None = None
    other_theme: float | None = None
    probe: ProbeQuality | None = None
    detector_distance: float | None = None
    objects: dict[str, dict[str, KeptObjects]] | None = None
    object_detector: DetectorQuality | None = None

    def as_json(self) -> str:
        """Return everything as JSON; numbers that are infinite or not numbers become null."""
        return json.dumps(_plain(asdict(self)), indent=2, allow_nan=False)

    def table(self) -> "Table":
        """Return a table of one line per source and window, without columns that are empty."""
        from rich.table import Table  # only needed here, and not installed everywhere

        caption = f"truth: {self.truth}"
        if self.probe is not None or self.detector_distance is not None:
            caption += (
                f"; palette error: real places of one theme {shown(self.same_theme, '{:.3f}')} "
                f"apart, of two themes {shown(self.other_theme, '{:.3f}')}"
            )
        if self.probe is not None:
            caption += (
                "; motion probe on held-out real clips: "
                f"yaw {self.probe.yaw:.3f}, forward {self.probe.forward:.3f}"
            )
        if self.detector_distance is not None:
            caption += (
                f"; keypoint detector on held-out real figures: {self.detector_distance:.2f} px"
            )
        if self.object_detector is not None:
            caption += (
                "; object detector on held-out real pictures: "
                f"recall {self.object_detector.recall:.3f}, "
                f"precision {self.object_detector.precision:.3f}"
            )
        for moment, sources in (self.objects or {}).items():
            shares = (f"{name} {shown(sources[name].kept, '{:.2f}')}" for name in self.checkpoints)
            caption += f"; objects kept after {moment}: {', '.join(shares)}"
        paths = self.checkpoints.items()
        title = ", ".join(name if name == path else f"{name}: {path}" for name, path in paths)
        table = Table(title=title, caption=caption)
        table.add_column("window")
        table.add_column("source")
        found = [each for sources in self.windows.values() for each in sources.values()]
        columns = [c for c in COLUMNS if any(getattr(each, c[1]) is not None for each in found)]
        for heading, _, _ in columns:
            table.add_column(heading, justify="right")
        for window, sources in self.windows.items():
            for place, (source, measurement) in enumerate(sources.items()):
                cells = (shown(getattr(measurement, field), form) for _, field, form in columns)
                last = place == len(sources) - 1
                table.add_row("" if place else window, source, *cells, end_section=last)
        return table


def shown(value: float | None, form: str) -> str:
    """Format a value; a dash if there is none."""
    return "-" if value is None else form.format(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
