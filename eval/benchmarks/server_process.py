"""`deliberate serve` in a process of its own, for the time of a benchmark."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from deliberate.utils.errors import DeliberateError

# Replicas on a busy machine take minutes.
_START_SECONDS = 600.0
_STOP_SECONDS = 60.0


@contextlib.contextmanager
def served(
    model: str, options: Sequence[str] = (), *, executor: str = "auto", threads: int = 1
) -> Iterator[tuple[str, int]]:
    """Starts a server on a free port; yields its address and process id, and stops it afterwards.

    Args:
        options: further ones of its command line.
        threads: OpenMP threads of the process.

    Raises:
        DeliberateError: it did not start.
    """
    command = [sys.executable, "-m", "deliberate.cli.app", "serve", model, "--port", "0"]
    command += ["--executor", executor, *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # Unbuffered, so that `select` sees every line that was not read.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment)
    try:
        line = _line_with_address(process.stdout, time.monotonic() + _START_SECONDS)
        if line is None:
            raise DeliberateError(f"{shlex.join(command[2:])} did not start: see its own message")
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        process.kill()
        process.wait()


def _line_with_address(output: Any, end: float) -> str | None:
    """The line that says where the server listens; others are passed over, such as Ray's. None
    where the output ends before it, or `end` is reached."""
    while select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
        line = output.readline().decode("utf-8", "replace")
        if not line or "http://" in line:
            return line or None
    return None
