"""Locks of files and folders that several processes may want to write.

The operating system holds the lock (``flock``; none on Windows) and releases it when the last
process that holds it ends, however that ended.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deliberate.utils.errors import DeliberateError

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK_NAME = "run.lock"
"""The file in a locked folder; it stays there, and names the process that locked it last."""


def try_lock(file: int | IO[Any]) -> bool:
    """Locks an open file exclusively, without waiting.

    Returns:
        Whether the lock is held; False where the system or the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[int]:
    """Makes `folder` and locks it against other runs until the block ends.

    Yields:
        The descriptor of the lock file. A process that inherits it holds the lock too until it
        ends, so the workers of a killed run keep the folder until the last of them has ended.

    Raises:
        DeliberateError: `folder` is a file, or another process holds the lock (which is named).
    """
    if folder.exists() and not folder.is_dir():
        raise DeliberateError(f"output_dir={folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Raises DeliberateError where another run holds the lock of `folder`; writes nothing."""
    if not (folder / LOCK_NAME).is_file():
        return
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        held = try_lock(descriptor)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise DeliberateError(
            f"output_dir={folder} is in use by another run ({holder or 'another process'}): wait "
            "for it, end it, or choose another output_dir"
        ) from None
    if not held and fcntl is not None:
        print(f"note: {folder} cannot be locked: start no second run in it", flush=True)
