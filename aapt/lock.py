"""The lock of a folder that a command resumes in: two runs never write into one folder.

Every command that resumes holds it, `aapt encode` and `aapt train` alike, from the first look into
the folder to the last write. The lock is `flock` on the file `.lock`. The system releases it when
the process ends, whatever ended the process: a folder does not stay locked after a crash.
"""

import errno
import fcntl
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems


class FolderInUse(ValueError):
    """Another process holds the lock of the folder; the message names its id and its start."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder. Of several ranks, rank 0 holds it for all.

    The lock file names this process, and is removed at the end. A folder that may not be written is
    not locked, because nothing in it can change. Raises FolderInUse at once if the lock is held, by
    this process or another, and OSError if the lock file cannot be written.
    """
    if not os.access(folder, os.W_OK):
        yield
        return
    file = _open_locked(folder)
    try:
        os.truncate(file, 0)
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(file, f"process {os.getpid()} on {platform.node()} since {start}".encode(), 0)
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # still locked, so the file is no other process's
        os.close(file)


def _open_locked(folder: Path) -> int:
    """Descriptor of the lock file, locked."""
    while True:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(folder, file)
        except (OSError, FolderInUse):
            os.close(file)
            raise
        # The process that held the lock may have removed the file after it was opened here.
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def _lock(folder: Path, file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        raise FolderInUse(
            f"{folder}: expected a folder in use by no other run, got one in use by {owner}; wait "
            "for its end, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        warnings.warn(
            f"{folder}: this file system has no locks; run one command at a time in the folder",
            stacklevel=5,
        )
