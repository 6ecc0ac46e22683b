"""The lock of a folder, against other processes and against ends of every kind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from aapt.lock import LOCK, FolderInUse, folder_lock

HOLD = """
import sys
from pathlib import Path
from aapt.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
    expected = rf"in use by process {holder.pid} on .* since \d{{4}}-\d\d-\d\d .*; wait for its end"
    with pytest.raises(FolderInUse, match=expected), folder_lock(tmp_path):
        pass
    holder.communicate("")
    assert holder.returncode == 0 and not any(tmp_path.iterdir())
    with folder_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / LOCK).read_text()
    with folder_lock(tmp_path):
        assert str(holder.pid) not in (tmp_path / LOCK).read_text()
    assert not any(tmp_path.iterdir())


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path):
        raise ZeroDivisionError
    with folder_lock(tmp_path), pytest.raises(FolderInUse), folder_lock(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_a_lock_file_that_was_removed_after_it_was_opened_is_not_the_lock(tmp_path, monkeypatch):
    """The first process ends between the opening and the locking of the second."""
    lock, locked = fcntl.flock, []

    def flock(file, operation):
        lock(file, operation)
        locked.append(os.fstat(file).st_ino)
        if len(locked) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder_lock(tmp_path):
        assert len(locked) == 2 and (tmp_path / LOCK).stat().st_ino == locked[1]


def test_a_folder_that_may_not_be_written_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with folder_lock(tmp_path), folder_lock(tmp_path):
        assert not any(tmp_path.iterdir())


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="no locks; run one command at a time"):
        with folder_lock(tmp_path):
            pass
