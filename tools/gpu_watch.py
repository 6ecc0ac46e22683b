"""Run pytest on a GPU where kernels may hang or take their process with them.

A case that hangs is killed and recorded as hung; the cases after it run in a new process.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

from gpu_parts import Group
from gpu_results import LOST_CONTEXT, ROOT, Results

START_SECONDS = 120.0  # until the first case, and from one to the next
POLL_SECONDS = 0.2
NO_CASES = 5  # pytest's exit status if none is left to run
DUMP = "Fatal Python error"  # how Python begins to say where it was, innermost call first
DUMP_SECONDS = 5.0  # in which a process that is killed says where it was
MAX_OUTPUT, MAX_WORDS = 20_000, 1500  # characters: held, and kept of a process that was killed


def run_group(group: Group, path: Path, deadline: float, root: Path = ROOT) -> None:
    """Run the group's cases until each is in the results file at `path`, or time is up.

    deadline: on time.monotonic(), of the whole part. root: the folder that case ids start from.
    """
    deadline = min(deadline, time.monotonic() + group.seconds)
    while True:
        status, why, words = run_once(group, path, deadline, root)
        results = Results(path)
        interrupted = results.running
        if interrupted is not None:
            facts = {"lost": True} if why != "out of time" else {}
            error = f"exit status {status}; {words}"
            results.end(
                interrupted["case"], why or "crashed", group=group.name, error=error, **facts
            )
        elif status not in (0, 1, LOST_CONTEXT, NO_CASES):
            case = f"{group.name}: pytest"
            error = f"pytest ended with status {status}; {words}"
            results.end(case, why or "error", group=group.name, error=error)
            return
        unfinished = interrupted is not None or status == LOST_CONTEXT
        if not unfinished or time.monotonic() >= deadline:
            return


def run_once(
    group: Group, path: Path, deadline: float, root: Path = ROOT
) -> tuple[int, str | None, str]:
    """One process: its exit status, why it was killed if it was, and the end of its output."""
    # No other plugins: those that happen to be installed cost time, and may change what runs.
    command = [sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "-p", "gpu_record"]
    command += [f"--record={path}", f"--group={group.name}", f"--rootdir={root}", "-q"]
    command += ["--no-header", "--tb=short", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", *(f"--case={case}" for case in group.cases)]
    command += [*(["--turns"] if group.turns else []), *group.files, *group.options]
    paths = [str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    begun = time.time()
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = Output(process)
    why = None
    try:
        while why is None and process.poll() is None:
            time.sleep(POLL_SECONDS)
            why = reason_to_kill(group, path, deadline, begun)
    finally:
        kill(process)
    return process.returncode, why, output.end()


def reason_to_kill(group: Group, path: Path, deadline: float, begun: float) -> str | None:
    if time.monotonic() > deadline:
        return "out of time"
    idle = idle_seconds(path, begun)
    if idle <= group.patience:
        return None
    running = Results(path).running
    limit = START_SECONDS if running is None else max(group.patience, running["patience"])
    return "hung" if idle > limit else None


def idle_seconds(path: Path, begun: float) -> float:
    """Time without progress: since a case last began or ended, or since the process began."""
    return time.time() - max(path.stat().st_mtime, begun)


class Output:
    """The output of a process: passed on at once, its end kept."""

    def __init__(self, process: subprocess.Popen):
        self.kept = ""
        self.process = process
        self.thread = Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            words = line.decode(errors="replace")
            self.kept = (self.kept + words)[-MAX_OUTPUT:]
            sys.stdout.write(words)
            sys.stdout.flush()

    def end(self) -> str:
        """The beginning of Python's dump, if there is one, else the last words."""
        self.thread.join(DUMP_SECONDS)
        _, found, dump = self.kept.partition(DUMP)
        return (found + dump)[:MAX_WORDS] if found else self.kept[-MAX_WORDS:].strip()


def kill(process: subprocess.Popen) -> None:
    """End a process with its children. SIGABRT first: on it Python prints where it was."""
    for signum, patience in ((signal.SIGABRT, DUMP_SECONDS), (signal.SIGKILL, 30)):
        if process.poll() is not None:
            break
        os.killpg(process.pid, signum)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # children that outlive it
    except (ProcessLookupError, PermissionError):
        pass
