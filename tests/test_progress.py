"""Tests wait for processes that work, and for no others."""

import subprocess
import sys
import time

import pytest

from .progress import Progress, children, finish, wait_until, work_seconds

HANG = "import time; print('up', flush=True); time.sleep(1e6)"
WORK = "print('up', flush=True)\nwhile True: pass"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.fixture
def start():
    """Starts Python programs that are ended after the test."""
    started = []

    def run(*arguments):
        process = subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield run
    for process in started:
        for child in children(process.pid):
            subprocess.run(["kill", "-9", str(child)])
        process.kill()
        process.communicate()


def checked(process, seconds):
    """Check a process for some time, with an idle limit that is a quarter of it."""
    progress, end = Progress(process.pid, idle_seconds=seconds / 4), time.monotonic() + seconds
    while time.monotonic() < end:
        progress.check()
        time.sleep(0.01)


@pytest.mark.parametrize("program", [[HANG], [PARENT, HANG]])
def test_a_process_that_hangs_fails_the_test(start, program):
    with pytest.raises(AssertionError, match="no work for"):
        checked(start(*program), 8)


@pytest.mark.parametrize("program", [[WORK], [PARENT, WORK]])
def test_work_of_a_process_or_its_child_is_progress(start, program):
    process = start(*program)
    wait_until(lambda: work_seconds(process.pid) > 1, process)


def test_the_output_of_a_process_is_returned():
    program = "import sys; print('out'); print('err', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert finish(process) == (b"out\n", b"err\n") and process.returncode == 0
    assert work_seconds(process.pid) == 0


def test_a_process_that_ends_early_fails_the_test():
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(AssertionError, match="ended with 3"):
        wait_until(lambda: False, process)
