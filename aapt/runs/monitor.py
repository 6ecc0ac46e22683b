"""Progress of a training run on the screen, and its metrics in a file.

`metrics.jsonl` holds one JSON object per update: `step`, `seconds` of training so far, then the
stage's metrics. A number that is not finite is written as a string, "nan" or "inf", which `float`
reads.
"""

import json
import math
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

from .alarms import Alarms

METRICS = "metrics.jsonl"
ALARMS = "alarms.txt"
ALARM = re.compile(rb".*? (\d+): alarm: .*\n")  # updates made when it was said
SECONDS_BETWEEN_LINES = 30.0  # in a log file; a terminal shows every update
RATE_UPDATES = 50  # updates in the mean that is shown as the rate


class Monitor:
    """Shows the progress of a stage, and appends the metrics of each update to a file.

    What goes wrong (`Alarms`) is printed too, with what to try first, and appended to `alarms.txt`.

    >>> with Monitor(folder, "adversarial", steps=1000, start_step=200) as monitor:
    ...     for step in range(200, 1000):
    ...         monitor.update(step, {"loss": 0.5})

    Args:
        folder: Folder of `metrics.jsonl` and `alarms.txt`. Lines of update `start_step` and later
            are cut off, because a resumed run makes these updates again. Seconds continue from the
            last line.
        name: Name of the stage.
        steps: Updates of the whole stage.
        start_step: The first update of this run.
        console: Receives progress; None for standard error. A terminal gets live lines, any other
            file one line every `seconds_between_lines`.
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
        truncate_alarms(self.path.parent / ALARMS, self.start_step)
        self._file = self.path.open("a")
        self._begun = time.perf_counter()
        self._times = deque([self._begun], maxlen=RATE_UPDATES + 1)
        self._said = -math.inf
        self._alarms = Alarms()
        for line in read_metrics(self.path):  # what a resumed run is compared with
            self._alarms.update(line)
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
        self._say(step, self._alarms.update(metrics))

    def sheet(self, step: int, measures: Mapping[str, float]) -> None:
        """Watch the measures of a sheet that was drawn after update `step`."""
        self._say(step, self._alarms.sheet(measures))

    def _say(self, step: int, texts: Iterable[str]) -> None:
        """Print alarms, and append them to a file beside the metrics."""
        for text in texts:
            line = f"{self.name} {step + 1}: alarm: {text}"
            self.console.print(line, style="yellow", soft_wrap=True, highlight=False, markup=False)
            with (self.path.parent / ALARMS).open("a") as file:
                print(line, file=file)

    def _rate(self, step: int) -> str:
        """Updates per second, and the time that the remaining updates take."""
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        rest = round((self.steps - step - 1) * seconds)
        clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
        return f"{1 / max(seconds, 1e-9):.3g} it/s  ETA {clock}"


class LiveLines(progress.Progress):
    """A progress bar with the metrics under it, on as many lines as they need."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["metrics"], style="dim") for task in self.tasks)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of a `metrics.jsonl`, without a last line that was cut off.

    ValueError naming the file and the line if a line is not an object of numbers.
    """
    return [metrics for metrics, _ in _lines(path)]


def truncate_metrics(path: Path, step: int) -> float:
    """Cut off the lines of update `step` and later. Returns the seconds of the last line left."""
    kept = []
    if step > 0 and path.is_file():
        kept = [(line, end) for line, end in _lines(path) if line["step"] < step]
    with path.open("ab") as file:
        file.truncate(kept[-1][1] if kept else 0)
    return kept[-1][0]["seconds"] if kept else 0.0


def truncate_alarms(path: Path, step: int) -> None:
    """Cut off the alarms of update `step` and later."""
    if not path.is_file():
        return
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        said = ALARM.match(line)
        if not said or int(said[1]) > step:
            break
        end += len(line)
    with path.open("ab") as file:
        file.truncate(end)


def _lines(path: Path) -> list[tuple[dict[str, float], int]]:
    """The metrics of each line, and the position after the line."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of metrics, which is missing")
    lines, end = [], 0
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        end += len(raw)
        if not raw.endswith(b"\n"):  # from a run that was killed while it wrote
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
    """A number as strict JSON holds it: a string if it is not finite."""
    return value if math.isfinite(value) else str(float(value))
