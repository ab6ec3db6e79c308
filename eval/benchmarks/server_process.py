"""`deliberate serve` in a process of its own, for the time of a benchmark."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence

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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        line = process.stdout.readline() if ready else ""
        if "http://" not in line:
            raise DeliberateError(f"{shlex.join(command[2:])} did not start: see its own message")
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        process.kill()
        process.wait()
