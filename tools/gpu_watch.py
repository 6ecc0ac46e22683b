"""Runs pytest on a GPU where kernels may hang or take their process with them.

A case that hangs is killed and recorded as such, and the cases after it run in a new process.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_results import LOST_CONTEXT, ROOT, Results

CASE_SECONDS = 120.0  # its compilations included
START_SECONDS = 120.0  # until the first case, and from one to the next
POLL_SECONDS = 0.2


def run_cases(
    selection: list[str], path: Path, seconds: float, case_seconds: float = CASE_SECONDS
) -> None:
    """Run pytest with these arguments until every case is in the results file, or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        status, why = run_once(selection, path, deadline, case_seconds)
        results = Results(path)
        interrupted = results.running
        if interrupted is not None:
            results.end(interrupted, why or f"crashed ({status})")
        elif status not in (0, 1, LOST_CONTEXT) and not (status == 5 and results.rows):
            results.end("pytest", why or "error", error=f"pytest ended with status {status}")
            return
        unfinished = interrupted is not None or status == LOST_CONTEXT
        if not unfinished or time.monotonic() >= deadline:
            return


def run_once(
    selection: list[str], path: Path, deadline: float, case_seconds: float
) -> tuple[int, str | None]:
    """One process: its status, and why it was killed if it was."""
    command = [sys.executable, "-m", "pytest", "-p", "gpu_record", f"--record={path}", *selection]
    paths = [str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    begun = time.time()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if time.monotonic() > deadline:
                return kill(process), "out of time"
            written = path.stat().st_mtime
            if (now := time.time()) > max(written, begun) + case_seconds:
                limit = case_seconds if Results(path).running else START_SECONDS
                if now > max(written, begun) + limit:
                    return kill(process), "hung"
        return process.returncode, None
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> int:
    """End a process with its children; SIGABRT first, on which Python prints where it was."""
    for signum, patience in ((signal.SIGABRT, 5), (signal.SIGKILL, 30)):
        if process.poll() is not None:
            break
        os.killpg(process.pid, signum)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    return process.returncode if process.returncode is not None else -signal.SIGKILL
