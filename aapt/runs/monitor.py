"""What a training run shows and writes while it runs: progress and metrics.

`metrics.jsonl` holds one JSON object per update: `step`, `seconds` of training so far, then the
stage's metrics. A number that is not finite is a string, "nan" or "inf", which `float` reads.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

METRICS = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 30.0  # of a log file; a terminal is refreshed all the time
RATE_UPDATES = 50  # the rate is a mean over so many updates


class Monitor:
    """Shows the progress of one stage, and appends the metrics of each update to its folder.

    >>> with Monitor(folder, "adversarial", steps=1000, start_step=200) as monitor:
    ...     for step in range(200, 1000):
    ...         monitor.update(step, stage.step(clips, random, step))

    Args:
        folder: Where `metrics.jsonl` is. Lines of `start_step` and after are cut off: the updates
            that a resumed run makes again. Its seconds count on.
        name: Of the stage.
        steps: Updates of the whole run.
        start_step: The first update of this run.
        console: Where progress goes, None for standard error: live lines on a terminal, elsewhere
            one line every `seconds_between_lines`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
    ):
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step: expected 0 to {steps}, got {start_step}")
        self.path, self.name, self.steps = folder / METRICS, name, steps
        self.start_step, self.seconds_between_lines = start_step, seconds_between_lines
        self.console = console or Console(stderr=True)

    def __enter__(self) -> "Monitor":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._earlier_seconds = truncate_metrics(self.path, self.start_step)
        self._file = self.path.open("a")
        self._begun = time.perf_counter()
        self._times = deque([self._begun], maxlen=RATE_UPDATES + 1)
        self._said = -math.inf
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("[green]{task.fields[rate]}[/]"),
        )
        live = self.console.is_terminal
        self._bar = LiveLines(*columns, console=self.console, disable=not live)
        self._task = self._bar.add_task(
            self.name, total=self.steps, completed=self.start_step, rate="", metrics=""
        )
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._file.close()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write and show the metrics of update `step`, counted from 0."""
        now = time.perf_counter()
        seconds = round(self._earlier_seconds + now - self._begun, 3)
        line = {"step": step, "seconds": seconds, **metrics}
        self._file.write(
            json.dumps({key: plain_number(value) for key, value in line.items()}) + "\n"
        )
        self._file.flush()
        self._times.append(now)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        if not self._bar.disable:
            rate = self._rate(step)
            self._bar.update(self._task, completed=step + 1, rate=rate, metrics=shown)
        elif now - self._said >= self.seconds_between_lines or step + 1 == self.steps:
            self._said = now
            line = f"{self.name} {step + 1}/{self.steps}  {self._rate(step)}  {shown}"
            print(line, file=self.console.file, flush=True)

    def _rate(self, step: int) -> str:
        """Updates a second, and the time that the rest will take."""
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        rest = round((self.steps - step - 1) * seconds)
        clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
        return f"{1 / max(seconds, 1e-9):.3g} it/s  ETA {clock}"


class LiveLines(progress.Progress):
    """A progress bar with the metrics under it, which may need more than a line."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["metrics"], style="dim") for task in self.tasks)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`. A last line that was cut off is left out.

    ValueError naming the file and the line where anything else is wrong.
    """
    return [metrics for metrics, _ in _lines(path)]


def truncate_metrics(path: Path, step: int) -> float:
    """Cut off the lines of `step` and after; returns the seconds of the last line that is left."""
    kept = []
    if step > 0 and path.is_file():
        kept = [(line, end) for line, end in _lines(path) if line["step"] < step]
    with path.open("ab") as file:
        file.truncate(kept[-1][1] if kept else 0)
    return kept[-1][0]["seconds"] if kept else 0.0


def _lines(path: Path) -> list[tuple[dict[str, float], int]]:
    """What each line holds, and the byte after it."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of metrics, which is missing")
    lines, end = [], 0
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        end += len(raw)
        if not raw.endswith(b"\n"):  # a run that was killed while it wrote
            break
        try:
            metrics = {key: float(value) for key, value in json.loads(raw).items()}
            if not {"step", "seconds"} <= metrics.keys():
                raise ValueError
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: line {number}: expected a JSON object of numbers with step and seconds, "
                f"got {raw[:60].decode(errors='replace').strip()!r}"
            ) from None
        lines.append((metrics, end))
    return lines


def plain_number(value: float) -> float | str:
    """A number as strict JSON can hold it."""
    return value if math.isfinite(value) else str(float(value))
