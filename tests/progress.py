"""Waiting for other processes while they work, however long a busy machine takes.

Work is processor time, of a process and its descendants. A process that waits for ever uses none.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

IDLE_SECONDS = 180.0  # with less than WORK_SECONDS of work in them, a process is stuck
WORK_SECONDS = 0.2
TICKS_PER_SECOND = 100  # of /proc/PID/stat


class Progress:
    """Fails the test once processes do nothing any more."""

    def __init__(self, *pids: int, idle_seconds: float = IDLE_SECONDS):
        self.pids, self.idle_seconds = pids, idle_seconds
        self.worked, self.since = -WORK_SECONDS, 0.0

    def check(self) -> None:
        """Call it again and again. AssertionError without work for `idle_seconds`."""
        worked, now = sum(map(work_seconds, self.pids)), time.monotonic()
        if worked >= self.worked + WORK_SECONDS:
            self.worked, self.since = worked, now
        idle = now - self.since
        assert idle < self.idle_seconds, f"processes {self.pids}: no work for {idle:.0f} s"


def work_seconds(pid: int) -> float:
    """Processor time of a process and its living descendants, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    ticks = sum(map(int, fields[11:15]))  # its own, and those of children that have ended
    return ticks / TICKS_PER_SECOND + sum(map(work_seconds, children(pid)))


def children(pid: int) -> list[int]:
    """Ids of the processes that a process has started and that have not ended."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):  # ended in between
        return []
    return [int(child) for text in lists for child in text.split()]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until `ready()`. AssertionError if the process ends before, or gets stuck."""
    progress = Progress(process.pid)
    while not ready():
        assert process.poll() is None, f"{process.args}: ended with {process.returncode}"
        progress.check()
        time.sleep(0.05)


def wait_for(event: threading.Event) -> None:
    """Wait for an event of another thread of this process. AssertionError if all are stuck."""
    progress = Progress(os.getpid())
    while not event.wait(timeout=5):  # seldom, because the wait itself is not work
        progress.check()


def finish(process: subprocess.Popen) -> tuple:
    """Wait for the end of a process and return its output, as `communicate` does.

    A process that gets stuck is killed, and the test fails.
    """
    progress = Progress(process.pid)
    while True:
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            try:
                progress.check()
            except AssertionError:
                process.kill()
                raise
