"""What every benchmark shares: requests, order of the variants, clocks, grading, facts of a run.

Variants answer each request one after the other before the next request, in an order that rotates
from request to request, so that a change of the machine's speed meets all of them alike. The first
requests warm up and are not counted. A clock is read only once the device has finished its work.
"""

from __future__ import annotations

import gc
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from tqdm import tqdm

from deliberate.api.model import AdaptiveModel
from deliberate.data.problem import Problem
from deliberate.data.prompts import Encoder
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.tasks.task import Task
from deliberate.kernels.backends import describe
from deliberate.utils.checks import one_of
from deliberate.utils.devices import synchronize
from deliberate.utils.environment import load_average
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

Clock = Callable[[], float]
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds: of the wall clock, or of this process's own time, for a machine that others use too."""

UNBOUNDED = 1 << 30
"""Tokens that stand for no limit of the context."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Name = TypeVar("Name")


@dataclass(frozen=True)
class BenchRequest:
    """One problem as it is put to the model.

    Attributes:
        problem: with the reference answer.
        prompt: token ids.
    """

    problem: Problem
    prompt: tuple[int, ...]


def encode_requests(
    task: Task, encoder: Encoder, context: int | None, *, warmup: int
) -> list[BenchRequest]:
    """The problems whose prompt leaves room for an answer, those that warm up first.

    Raises:
        DeliberateError: no more of them than warm up.
    """
    room = (context or UNBOUNDED) - task.max_new_tokens
    every = [BenchRequest(p, tuple(encoder.prompt(p.question))) for p in task.problems]
    fitting = [request for request in every if len(request.prompt) <= room]
    if len(fitting) <= warmup:
        raise DeliberateError(
            f"{len(fitting)} problems leave room for task.max_new_tokens={task.max_new_tokens} in "
            f"the context of {context}, and warmup={warmup} of them are not counted: take more "
            "problems or a lower task.max_new_tokens"
        )
    return fitting


@dataclass(frozen=True)
class Turn:
    """One variant's turn at one request.

    Attributes:
        index: number of the request, those that warm up included.
        counted: the request is not one of those that warm up.
    """

    index: int
    counted: bool


def interleaved(
    items: Sequence[Item], variants: Sequence[Name], *, warmup: int, title: str
) -> Iterator[tuple[Turn, Item, Name]]:
    """Every item with every variant before the next item, the first variant rotating.

    Garbage is collected between items, never within one.
    """
    names = list(variants)
    for index, item in enumerate(tqdm(items, desc=title, leave=False)):
        gc.collect()
        first = index % len(names)
        turn = Turn(index, counted=index >= warmup)
        for name in names[first:] + names[:first]:
            yield turn, item, name


def timed(
    run: Callable[[], Result],
    clock: Clock = time.perf_counter,
    device: torch.device | None = None,
) -> tuple[Result, float]:
    """What `run` returns, and the seconds that it took with the device's work finished."""
    synchronize(device)
    began = clock()
    result = run()
    synchronize(device)
    return result, clock() - began


def grade_texts(
    task: Task,
    problems: Sequence[Problem],
    texts: Mapping[Name, Sequence[str | None]],
    graders: DictConfig,
) -> dict[Name, list[bool]]:
    """Whether each variant's answer to each problem is correct; None, no answer, is not.

    Args:
        texts: one per problem of each variant.
        graders: settings ``processes`` and ``time_limit``.
    """
    correct: dict[Name, list[bool]] = {name: [] for name in texts}
    with GraderPool(graders.processes, time_limit=graders.time_limit) as pool:
        for number, problem in enumerate(problems):
            given = {name: own[number] for name, own in texts.items()}
            grades = task.grade(problem, [text or "" for text in given.values()], pool)
            for (name, text), grade in zip(given.items(), grades, strict=True):
                correct[name].append(text is not None and grade.correct)
    return correct


def load_model(cfg: DictConfig) -> AdaptiveModel:
    """``cfg.model`` by ``cfg.executor``, on a GPU where there is one, with ``cfg.calibration``."""
    model = AdaptiveModel.from_pretrained(
        str(cfg.model), executor=str(cfg.executor), weights=str(cfg.get("weights", "float"))
    )
    if torch.cuda.is_available():
        model = model.to("cuda")
    calibration = cfg.get("calibration")
    if calibration is not None:
        model.set_calibration(Path(str(calibration)).expanduser())
    return model


def thresholds_of(cfg: DictConfig) -> Any:
    """``cfg.thresholds``: one number, a tuple with one per exit, or None for the model's own."""
    given = cfg.thresholds
    return tuple(given) if isinstance(given, ListConfig) else given


def check_clock(cfg: DictConfig) -> Clock:
    """The clock that ``cfg.clock`` names.

    Raises:
        DeliberateError: there is none of this name.
    """
    return CLOCKS[one_of("clock", cfg.clock, CLOCKS)]


class Session:
    """One run of a benchmark: how many threads it has, and the facts that its record states.

    Args:
        name: of the benchmark.
        arguments: overrides on the command line.
        threads: of this process from now on.
    """

    def __init__(self, name: str, arguments: Sequence[str], threads: int) -> None:
        self._command = shlex.join(["deliberate", "bench", name, *arguments])
        self._threads = threads
        torch.set_num_threads(threads)
        self._environment = describe()
        self._before = load_average()
        self._after: Any = None

    def end(self) -> None:
        """Notes the load of the machine; call it when the last clock has been read."""
        self._after = load_average()

    @property
    def load(self) -> dict[str, Any]:
        """Load of the machine before and after the measurement."""
        return {"before": self._before, "after": self._after}

    def facts(self) -> dict[str, Any]:
        """Command, date, machine and versions, and load, JSON-ready."""
        return {
            "command": self._command,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": self._environment,
            "load": self.load,
        }

    def line(self, clock: str | None = None) -> str:
        """The facts in one line for a terminal."""
        timed_by = "" if clock is None else f", {clock} time"
        return (
            f"{self._environment['cpu']}, {self._threads} thread(s){timed_by}, "
            f"torch {torch.__version__}; load {self._before} before, {self._after} after"
        )

    def write(self, path: object, record: Mapping[str, Any]) -> None:
        """Writes a record with the facts as JSON; does nothing where `path` is None."""
        if path is not None:
            text = json.dumps(dict(record) | self.facts(), indent=1, allow_nan=False)
            write_text(Path(str(path)).expanduser(), text + "\n")


def table_console(width: int | None = None) -> Console:
    """A console without highlighting; `width` where nothing says how wide a line may be."""
    console = Console(highlight=False)
    if width is not None and not console.is_terminal:
        console.width = width
    return console


def stop_if_inexact(exact: int, total: int, what: str) -> None:
    """Ends the command with an error where exact mode did not repeat dense.

    Raises:
        DeliberateError: `exact` of `total` answers are token-identical, fewer than all.
    """
    if exact != total:
        raise DeliberateError(
            f"exact differs from dense on {total - exact} of {total} {what}: a near-tie in the "
            "logits, or a bug"
        )
