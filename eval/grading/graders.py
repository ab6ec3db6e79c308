"""Grading of a model's text against a reference answer.

Three stages, cheapest first: the answer is taken out of the text; numbers, words and identical
expressions are compared exactly, in this process and in linear time (conventions in
`deliberate.eval.grading.answers`); only what is left, symbolic mathematics
(`deliberate.eval.grading.symbolic`) and
the scores of reasoning-gym's own code, goes to worker processes with a hard time limit
(`GraderPool`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any

from deliberate.data.problem import Problem
from deliberate.eval.grading.answers import LONGEST_ANSWER, Style, compare_exactly, extract_answer
from deliberate.eval.grading.exact_numbers import exact_number
from deliberate.eval.grading.symbolic import equal_by_math_verify
from deliberate.utils.errors import DeliberateError

__all__ = ["Grade", "GraderPool", "Style", "exact_number", "extract_answer", "grade", "settle"]


@dataclass(frozen=True)
class Grade:
    """The verdict on one answer.

    Attributes:
        correct: whether the answer equals the reference.
        predicted: the answer as extracted, None where the text holds none.
        method: what settled it: ``no_answer`` (truncated or unmarked), ``number``,
            ``not_a_number`` (the reference is a number and the GSM8K answer is not),
            ``too_long`` (no reference is that long), ``text`` (words), ``string`` (identical
            expressions), ``math_verify``, ``own_score`` (reasoning-gym) or ``timeout`` (the
            worker exceeded the time limit or died).
    """

    correct: bool
    predicted: str | None
    method: str


def settle(prediction_text: str, reference: str, style: Style) -> Grade | str:
    """The grade where no algebra is needed, otherwise the extracted answer, still to be judged."""
    predicted = extract_answer(prediction_text, style)
    if predicted is None:
        return Grade(False, None, "no_answer")
    verdict = compare_exactly(predicted, reference, style)
    return predicted if verdict is None else Grade(verdict[0], predicted, verdict[1])


def grade(prediction_text: str, reference: str, style: Style = "auto") -> Grade:
    """Grade one text in this process.

    Symbolic answers run `math-verify` here: main thread only, and its own time limit cannot
    interrupt a computation inside C code; use `GraderPool` for answers nobody has looked at.

    Args:
        prediction_text: all that the model wrote.
        reference: the final answer only.
        style: how answers are marked, see `extract_answer`.
    """
    settled = settle(prediction_text, reference, style)
    if isinstance(settled, Grade):
        return settled
    return Grade(equal_by_math_verify(settled, reference), settled, "math_verify")


_STARTUP_SECONDS = 120.0
_WORKER_MEMORY = 4 << 30  # bytes of address space: 9^{9^{9}} must not take the machine with it
_WORKER_CODE = (
    "import sys; from deliberate.eval.grading.graders import _serve; _serve(*sys.argv[1:])"
)


def _score(problem: Problem, predicted: str) -> bool:
    """Whether reasoning-gym gives the answer its full score."""
    from deliberate.data.sources import score_reasoning_gym

    try:
        return score_reasoning_gym(problem, predicted) == 1.0
    except Exception:  # the scorers parse whatever a model wrote; several raise on nonsense
        return False


_JUDGES: dict[str, Callable[..., bool]] = {"math_verify": equal_by_math_verify, "own_score": _score}


@dataclass(frozen=True)
class _Job:
    """An answer to be judged in a worker: place among the grades, judge, and what it is given."""

    index: int
    judge: str
    given: tuple[Any, ...]


def _serve(descriptor: str, time_limit: str) -> None:
    """Body of a worker process: judge answers until the parent closes."""
    connection = Connection(int(descriptor))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, _WORKER_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    equal_by_math_verify("x", "y")  # pay for the imports before the first clock starts
    connection.send(None)
    with open(os.devnull, "w") as nowhere, contextlib.suppress(EOFError, OSError):
        while True:
            judge, given = connection.recv()
            if judge == "own_score":  # its import is no part of the answer's time
                importlib.import_module("reasoning_gym")
            # Should the parent be gone when this one hangs, it ends by itself.
            faulthandler.dump_traceback_later(float(time_limit) + 5, exit=True, file=nowhere)
            connection.send(_JUDGES[judge](*given))
            faulthandler.cancel_dump_traceback_later()


class _Worker:
    """One process and its connection; `job` is what it works on."""

    def __init__(self, time_limit: float) -> None:
        self.connection, theirs = Pipe()
        # A bare interpreter, not multiprocessing's spawn: that imports the main module again,
        # which is the command line and with it torch.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER_CODE, str(theirs.fileno()), str(time_limit)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.ready = False
        self.scores = False  # whether it has imported reasoning-gym
        self.job: _Job | None = None
        self.deadline = time.monotonic() + _STARTUP_SECONDS

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class GraderPool:
    """Grades many answers; symbolic ones in worker processes under a hard time limit.

    The workers start with the first answer that needs them, so grading numbers costs none. A
    worker that exceeds the limit or dies is replaced and its item graded incorrect with method
    ``timeout``. Use as a context manager, or call `close`.

    Args:
        processes: workers at most.
        time_limit: seconds for one answer, above math-verify's own limits of 5 s a step.
    """

    def __init__(self, processes: int = 2, *, time_limit: float = 20.0) -> None:
        if processes < 1 or time_limit <= 0:
            raise DeliberateError(
                f"processes={processes}, time_limit={time_limit}: at least 1 and more than 0 s"
            )
        if importlib.util.find_spec("math_verify") is None:
            raise DeliberateError("math-verify is missing: pip install 'math-verify[antlr4_9_3]'")
        self.processes = processes
        self.time_limit = time_limit
        self._workers: list[_Worker] = []

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the pool may be used again and starts new ones."""
        while self._workers:
            self._workers.pop().stop()

    @property
    def workers_started(self) -> int:
        """Worker processes now held."""
        return len(self._workers)

    def grade_many(
        self, items: Iterable[tuple[str, str, Style]], progress: bool = False
    ) -> list[Grade]:
        """Grades of ``(prediction_text, reference, style)`` triples, in their order.

        Raises:
            DeliberateError: an unknown style, or workers that cannot start.
        """
        grades: list[Grade] = []
        undecided: deque[_Job] = deque()
        for index, (text, reference, style) in enumerate(items):
            settled = settle(text, reference, style)
            if isinstance(settled, str):
                undecided.append(_Job(index, "math_verify", (settled, reference)))
                settled = Grade(False, settled, "timeout")
            grades.append(settled)
        self._judge(undecided, grades, progress)
        return grades

    def score_many(self, items: Iterable[tuple[Problem, str, Style]]) -> list[Grade]:
        """Grades of ``(reasoning-gym problem, text, style)`` triples by the data set's own score.

        Correct is a score of 1. The scorers are other people's code that parses what a model
        wrote: they run in the workers, under the same limits.
        """
        grades: list[Grade] = []
        undecided: deque[_Job] = deque()
        for index, (problem, text, style) in enumerate(items):
            predicted = extract_answer(text, style)
            if predicted is None:
                grades.append(Grade(False, None, "no_answer"))
            elif len(predicted) > LONGEST_ANSWER:
                grades.append(Grade(False, predicted, "too_long"))
            else:
                undecided.append(_Job(index, "own_score", (problem, predicted)))
                grades.append(Grade(False, predicted, "timeout"))
        self._judge(undecided, grades, progress=False)
        return grades

    def _judge(self, queue: deque[_Job], grades: list[Grade], progress: bool) -> None:
        if not queue:
            return
        try:
            self._work_through(queue, grades, progress)
        except BaseException:
            self.close()  # answers under way would be taken for those of the next call
            raise

    def _work_through(self, queue: deque[_Job], grades: list[Grade], progress: bool) -> None:
        from tqdm import tqdm

        wanted = min(self.processes, len(queue))
        with tqdm(total=len(queue), desc="grading", disable=not progress) as bar:
            while queue or any(worker.job is not None for worker in self._workers):
                while len(self._workers) < wanted:
                    self._workers.append(_Worker(self.time_limit))
                for worker in [w for w in self._workers if w.ready and w.job is None]:
                    self._hand_out(worker, queue)
                waiting = [w for w in self._workers if not w.ready or w.job is not None]
                nearest = min((w.deadline for w in waiting), default=time.monotonic())
                ready = wait([w.connection for w in waiting], max(0, nearest - time.monotonic()))
                for worker in waiting:
                    if worker.connection in ready or time.monotonic() >= worker.deadline:
                        bar.update(self._take_in(worker, grades))

    def _hand_out(self, worker: _Worker, queue: deque[_Job]) -> None:
        if not queue:
            return
        job = queue[0]
        try:
            worker.connection.send((job.judge, job.given))
        except OSError:  # it died idle: the item is still in the queue
            self._discard(worker)
            return
        queue.popleft()
        worker.job, worker.deadline = job, time.monotonic() + self.time_limit
        if job.judge == "own_score" and not worker.scores:
            worker.scores, worker.deadline = True, worker.deadline + _STARTUP_SECONDS

    def _take_in(self, worker: _Worker, grades: list[Grade]) -> int:
        """Read one verdict; 1 when an item is done (judged or given up), 0 at a start."""
        job = worker.job
        try:
            if not worker.connection.poll():
                raise EOFError  # past its deadline
            verdict = worker.connection.recv()
        except (EOFError, OSError):
            self._discard(worker)
            if not worker.ready:
                raise DeliberateError(
                    f"a grading worker did not start (exit status {worker.process.returncode}): "
                    "its own message stands above"
                ) from None
            return 1
        worker.ready, worker.job = True, None
        if job is None:
            return 0
        grades[job.index] = Grade(verdict, grades[job.index].predicted, job.judge)
        return 1

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()
