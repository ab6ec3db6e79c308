"""Several training processes on one machine, each running the same command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from deliberate.utils.errors import DeliberateError

LAUNCHER_VARIABLE = "DELIBERATE_LAUNCHER"
"""Environment variable of the workers of `run_workers`: the descriptor of the launcher's pipe."""
_ORPHANED = 3


def is_worker() -> bool:
    """Whether this process was started as one of several (by `run_workers` or torchrun)."""
    return "LOCAL_RANK" in os.environ


def launched_here() -> bool:
    """Whether `run_workers` started this process, and so holds the lock of the run's folder."""
    return LAUNCHER_VARIABLE in os.environ


def end_with_launcher() -> None:
    """Ends this worker as soon as the process that started it has ended, however that ended.

    An orphaned worker would write checkpoints into a folder that the next run uses. The launcher
    holds the other end of a pipe, which the system closes even after a SIGKILL.
    """
    if not launched_here():
        return
    pipe = int(os.environ[LAUNCHER_VARIABLE])

    def watch() -> None:
        os.read(pipe, 1)
        print("error: the process that ran this worker is gone", file=sys.stderr, flush=True)
        os._exit(_ORPHANED)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def work_and_exit(work: Callable[[], object]) -> NoReturn:
    """Runs a worker's part, then ends the process at once with status 0, 1 or 2.

    The usual teardown can hang: freeing gloo's process group waits, with the interpreter's lock
    held, for a thread that may be waiting for that lock to free a finished operation's tensors.
    """
    status = 0
    end_with_launcher()
    try:
        work()
    except DeliberateError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_workers(processes: int, arguments: Sequence[str], *, keeps: Sequence[int] = ()) -> bool:
    """Runs ``deliberate train ARGUMENTS`` in `processes` workers and waits for all of them.

    The workers meet as torchrun's do (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). torchrun itself
    is not used because it kills workers 30 seconds after Ctrl-C, in the middle of a long step. Here
    every SIGINT that this process gets is passed on once, and the workers save before they end.

    Args:
        keeps: open files that the workers hold too, as the lock of the run's folder.

    Returns:
        Whether the run was interrupted.

    Raises:
        DeliberateError: a worker failed; the others have been ended.
    """
    # One thread each unless told otherwise: at this size two workers with a thread each train
    # about 1.7 times as fast as one worker with two threads.
    shared = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "deliberate.cli.app", "train", *arguments]
    workers: list[subprocess.Popen[bytes]] = []
    ends, kept_open = os.pipe()  # see `end_with_launcher`; no worker inherits the second end
    shared |= {LAUNCHER_VARIABLE: str(ends)}
    try:
        with _passing_on_signals(processes) as signals:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own, so that the terminal's Ctrl-C does not arrive twice.
                workers.append(
                    subprocess.Popen(
                        command,
                        env=shared | own,
                        start_new_session=True,
                        pass_fds=(ends, *keeps),
                    )
                )
                signals.started(workers[-1])
            received = signals.received
            failed = _wait(workers, received)
    finally:
        _end(workers)
        os.close(ends)
        os.close(kept_open)
    if failed is not None and not received:
        raise DeliberateError(
            f"training worker {failed} ended with status {workers[failed].returncode}: "
            "see its output above"
        )
    return bool(received)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(workers: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> int | None:
    """Waits for all workers to succeed or one to fail; the rank of the one that failed.

    After a signal the first worker saves for all, and the others are not waited for.
    """
    while True:
        states = [worker.poll() for worker in workers]
        for rank, state in enumerate(states):
            if state:
                return rank
        if all(state == 0 for state in states) or (received and states[0] == 0):
            return None
        time.sleep(0.1)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=10)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


class _Signals:
    """What this process received, handed to every worker once.

    A signal may come while a worker is being started: what it has not got yet is kept for it.
    Taking from a deque is one step of the interpreter, so a handler that runs in between delivers
    nothing twice.
    """

    def __init__(self, processes: int) -> None:
        self.received: list[int] = []
        self._due: list[deque[int]] = [deque() for _ in range(processes)]
        self._workers: list[subprocess.Popen[bytes]] = []

    def started(self, worker: subprocess.Popen[bytes]) -> None:
        """Passes signals on to this worker too."""
        self._workers.append(worker)
        self._deliver()

    def pass_on(self, number: int, _frame: FrameType | None) -> None:
        """The handler."""
        self.received.append(number)
        for due in self._due:
            due.append(number)
        self._deliver()

    def _deliver(self) -> None:
        for worker, due in zip(self._workers, self._due, strict=False):
            while due:
                try:
                    number = due.popleft()
                except IndexError:  # by a handler that ran just now
                    break
                if worker.poll() is None:
                    worker.send_signal(number)


@contextmanager
def _passing_on_signals(processes: int) -> Iterator[_Signals]:
    """Passes SIGINT and SIGTERM on to so many workers; yields what it received."""
    signals = _Signals(processes)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, signals.pass_on)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
