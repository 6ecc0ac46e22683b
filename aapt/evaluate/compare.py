"""Compare checkpoints over several seeds: means with confidence intervals, and differences.

Every seed is one evaluation of all checkpoints on worlds or clips and noise of its own. Checkpoints
of one seed share these, so their differences vary less than they do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import write_json
from ..lock import folder_lock
from ..media.figures import path_labels
from ..model.caches import MODEL
from ..streaming.generator import StreamingGenerator
from .evaluation import checkpoint_digests, evaluate, placed
from .report import COLUMNS, shown
from .scenes import AUTOENCODER, TRUTH

if TYPE_CHECKING:
    from rich.table import Table

# Student's t for 95 %, two-sided, by degrees of freedom from 1; the last serves for more, where it
# is a little wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
COMPARISON = "comparison.json"
# The settings that a report's measures depend on, and those of them that depend on the machine.
MEASURED_BY = (
    *("starts", "seconds", "seed", "latents"),
    *("fid", "fvd", "keypoints", "camera_poses", "cache"),
)
PLACED = ("device", "dtype", "size")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """Estimate from one value per seed; None for fewer than two."""
        count = len(values)
        if count < 2:
            return None
        mean = math.fsum(values) / count
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        student = STUDENT[min(count - 1, len(STUDENT)) - 1]
        return cls(mean, student * math.sqrt(variance / count))

    @property
    def clear(self) -> bool:
        """True if the interval does not hold zero."""
        return abs(self.mean) > self.half


@dataclass(frozen=True)
class Comparison:
    """Measures of checkpoints over seeds, by window, then source, then measure.

    Attributes:
        checkpoints: Path or name of each checkpoint, by source; the others are compared with the
            first.
        settings: Settings of the evaluations, with their `seeds`.
        means: Every source's measures, where at least two seeds have one.
        differences: Measures of each later checkpoint less those of the first, seed by seed.
    """

    checkpoints: dict[str, str]
    settings: dict[str, Any]
    means: dict[str, dict[str, dict[str, Interval]]]
    differences: dict[str, dict[str, dict[str, Interval]]]

    def table(self) -> Table:
        """Return a table of one line per source and window. A star marks a measure whose difference
        from the first checkpoint has an interval without zero."""
        from rich.table import Table  # only needed here, and not installed everywhere

        seeds = ", ".join(map(str, self.settings["seeds"]))
        first = next(iter(self.checkpoints))
        table = Table(
            title=", ".join(self.checkpoints),
            caption=f"means and 95 % intervals over seeds {seeds}; * differs from {first}",
        )
        found = [measures for sources in self.means.values() for measures in sources.values()]
        columns = [c for c in COLUMNS if any(c[1] in measures for measures in found)]
        for heading in ("window", "source", *(heading for heading, _, _ in columns)):
            table.add_column(heading)
        for window, sources in self.means.items():
            for place, (source, measures) in enumerate(sources.items()):
                differs = self.differences[window].get(source, {})
                cells = []
                for _, field, form in columns:
                    one, other = measures.get(field), differs.get(field)
                    star = "*" if other is not None and other.clear else ""
                    half = "" if one is None else f" ± {shown(one.half, form)}{star}"
                    cells.append(shown(one and one.mean, form) + half)
                last = place == len(sources) - 1
                table.add_row("" if place else window, source, *cells, end_section=last)
        return table


def compare(
    checkpoints: Sequence[str | Path],
    out: Path,
    seeds: Sequence[int],
    *,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> Comparison:
    """Evaluate checkpoints under every seed, each in `out`/seed-N, and compare them.

    A report that is already there is read and not made again. Writes `comparison.json` into `out`.

    Args:
        checkpoints: As `evaluate` takes them, two or more; the others are compared with the first.
        seeds: Two or more different seeds.
        settings: Further arguments of `evaluate`.

    ValueError for fewer checkpoints or seeds, for a report of other checkpoints, weights or
    settings, and as `evaluate` raises; FolderInUse while another process works in `out`.
    """
    names = path_labels(checkpoints, taken=(TRUTH, AUTOENCODER))
    if len(names) < 2:
        raise ValueError(f"checkpoints: expected two or more to compare, got {len(names)}")
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        got = ", ".join(map(str, seeds)) or "none"
        raise ValueError(f"seed: expected two or more different seeds, got {got}")
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        return _compare(checkpoints, names, out, seeds, log, settings)


def _compare(
    checkpoints: Sequence[str | Path],
    names: Sequence[str],
    out: Path,
    seeds: Sequence[int],
    log: Callable[[str], None],
    settings: Mapping[str, Any],
) -> Comparison:
    paths = {seed: out / f"seed-{seed}" / "report.json" for seed in seeds}
    missing = [seed for seed in seeds if not paths[seed].is_file()]
    wanted = {name: settings[name] for name in MEASURED_BY if name in settings}
    where = {name: settings.get(name) for name in PLACED}
    # Reports of another machine can be compared here, and completed with the same settings alone.
    if missing or any(value is not None for value in where.values()):
        cache = settings.get("cache", MODEL)
        wanted |= placed(StreamingGenerator.from_pretrained(checkpoints[0], **where, cache=cache))
    made_of = dict(zip(names, map(str, checkpoints))), checkpoint_digests(checkpoints)

    def read(seed: int) -> dict[str, Any]:
        return _read(paths[seed], *made_of, wanted | {"seed": seed})

    # What is there is read before the first evaluation, which may take hours.
    reports = {seed: read(seed) for seed in seeds if seed not in missing}
    for seed in missing:
        log(f"seed {seed}")
        evaluate(checkpoints, paths[seed].parent, seed=seed, log=log, **settings)
        reports[seed] = read(seed)
    for seed in seeds:
        if _shared(reports[seed]) != _shared(reports[seeds[0]]):
            raise _other_report(paths[seed])
    comparison = _compared([reports[seed] for seed in seeds], names, seeds)
    write_json(out / COMPARISON, asdict(comparison))
    return comparison


def _read(
    path: Path,
    checkpoints: Mapping[str, str],
    digests: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Read a report; ValueError if it is of other checkpoints, weights or settings."""
    try:
        report = json.loads(path.read_text())
        made_of, made_by = (report["checkpoints"], report["digests"]), dict(report["settings"])
    except (AttributeError, ValueError, TypeError, KeyError):
        raise _other_report(path) from None
    wanted = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    if made_of != (checkpoints, digests) or any(made_by.get(n) != x for n, x in wanted.items()):
        raise _other_report(path)
    return report


def _shared(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the reports of all seeds have."""
    return {name: value for name, value in report["settings"].items() if name != "seed"}


def _other_report(path: Path) -> ValueError:
    return ValueError(
        f"{path}: expected a report of these checkpoints, their weights and settings, got another; "
        "pass another folder as --out"
    )


def _compared(
    reports: Sequence[Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> Comparison:
    """Compare the reports of several seeds."""
    first, *_ = reports
    means: dict = {}
    differences: dict = {}
    for window, sources in first["windows"].items():
        means[window], differences[window] = {}, {}
        for source, fields in sources.items():
            found = {
                field: [report["windows"][window][source][field] for report in reports]
                for field in fields
            }
            means[window][source] = _intervals(found)
            if source in names[1:]:
                base = [report["windows"][window][names[0]] for report in reports]
                less = {
                    field: [
                        None if value is None or at[field] is None else value - at[field]
                        for value, at in zip(values, base, strict=True)
                    ]
                    for field, values in found.items()
                }
                differences[window][source] = _intervals(less)
    settings = _shared(first) | {"seeds": list(seeds)}
    return Comparison(dict(first["checkpoints"]), settings, means, differences)


def _intervals(measures: Mapping[str, Sequence[float | None]]) -> dict[str, Interval]:
    """Estimate every measure that at least two seeds have."""
    known = {name: [v for v in values if v is not None] for name, values in measures.items()}
    found = {name: Interval.of(values) for name, values in known.items()}
    return {name: interval for name, interval in found.items() if interval is not None}
