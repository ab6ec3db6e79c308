"""One run at a time in a folder: a lock that the system takes back when its holder dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deliberate.utils.errors import DeliberateError

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK_NAME = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps other runs out of `folder`, which is made, for the time of a block.

    Yields:
        The open file that holds the lock. A process that inherits it holds the lock too, until it
        ends: so a killed run's workers keep the folder until the last of them is gone.

    Raises:
        DeliberateError: another process holds it; the line names that process.
    """
    if folder.exists() and not folder.is_dir():
        raise DeliberateError(f"output_dir={folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, folder)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


def check_unlocked(folder: Path) -> None:
    """Refuses a folder that another run writes to; makes and keeps nothing."""
    if not (folder / LOCK_NAME).is_file():
        return
    handle = os.open(folder / LOCK_NAME, os.O_RDWR)
    try:
        _take(handle, folder)
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        raise DeliberateError(
            f"output_dir={folder} is in use by another run ({holder}): wait for it, end it, or "
            "choose another output_dir"
        ) from None
    except OSError:  # a file system without locks
        print(f"note: {folder} cannot be locked: start no second run in it", flush=True)
