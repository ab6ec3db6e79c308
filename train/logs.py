"""Logs of a training run: console, a CSV file, wandb."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deliberate.utils.durations import hours_and_minutes
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read

CSV_NAME = "metrics.csv"
SEGMENTS_NAME = "wandb/segments.json"
# The run's duration is estimated after so many steps, or at the first step after so many seconds.
_ESTIMATE_AT, _ESTIMATE_AFTER = 4, 20.0


class CsvLog(TrainerCallback):
    """Writes ``metrics.csv``, one row a log line: step, loss, learning rate, every figure by exit.

    The columns are those of the first line. A resumed run first rewrites the rows up to its
    checkpoint, so that rows which a killed run wrote after it do not appear twice.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CSV_NAME
        self._columns: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rewrites the file with what was logged before the checkpoint."""
        if not state.is_world_process_zero:
            return
        past = [line for line in state.log_history if "loss" in line]
        self._columns = _columns(past[0]) if past else []
        text = _rows([dict(zip(self._columns, self._columns, strict=True)), *past], self._columns)
        write_text(self.path, text if past else "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a row."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        line = {**logs, "step": state.global_step}
        with self.path.open("a", encoding="utf-8") as file:
            if not self._columns:
                self._columns = _columns(line)
                file.write(_rows([dict(zip(self._columns, self._columns, strict=True))],
                                 self._columns))  # fmt: skip
            file.write(_rows([line], self._columns))


def _columns(line: Mapping[str, Any]) -> list[str]:
    first = ["step", "loss", "learning_rate", "grad_norm"]
    return [*first, *sorted(set(line) - set(first))]


def _rows(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writerows(lines)
    return text.getvalue()


class ConsoleLog(TrainerCallback):
    """Prints one line a log line, and on a terminal a bar with the time left.

    ``step 40/600  loss 1.234  lr 0.004  exit2 loss 1.5 agree 81% ece 0.03  ...  speed@99% 1.31``

    After the first steps it prints how long the run will take. Use it as a context manager around
    `train`, so that the bar ends with it.

    Args:
        step_tokens: real tokens of an optimizer step, by its number from 0.
        clock: seconds.
        bar: draw a bar; by default where standard error is a terminal.
    """

    def __init__(
        self,
        step_tokens: Callable[[int], int] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        bar: bool | None = None,
    ) -> None:
        self._clock, self._step_tokens = clock, step_tokens
        self._wants_bar = sys.stderr.isatty() if bar is None else bar
        self._bar: Any = None
        self._began: tuple[float, int] | None = None
        self._first_took: float | None = None
        self._tokens = self._first_tokens = 0
        self._estimated = False

    def __enter__(self) -> ConsoleLog:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock with the first step of this process."""
        if self._began is not None:
            return
        self._began = self._clock(), state.global_step
        if self._wants_bar and state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar; prints once how long the run will take."""
        if not state.is_world_process_zero or self._began is None:
            return
        tokens = 0 if self._step_tokens is None else self._step_tokens(state.global_step - 1)
        self._tokens += tokens
        took, steps = self._clock() - self._began[0], state.global_step - self._began[1]
        if self._first_took is None:
            self._first_took, self._first_tokens = took, tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._tokens / max(took, 1e-9):,.0f} tokens/s", False)
            self._bar.update(1)
        if not self._estimated and (steps >= _ESTIMATE_AT or took > _ESTIMATE_AFTER):
            self._estimated = True
            self._say(self._estimate(took, steps, state.max_steps - state.global_step))

    def _estimate(self, took: float, steps: int, left: int) -> str:
        """How long the run will take, by its first steps without the very first, a warm-up."""
        assert self._first_took is not None  # set by the first step
        tokens = self._tokens
        if steps > 1:
            took, tokens, steps = took - self._first_took, tokens - self._first_tokens, steps - 1
        speed = f", {tokens / max(took, 1e-9):,.0f} tokens/s" if tokens else ""
        expected = hours_and_minutes(took / steps * left)
        return (
            f"estimate: {took / steps:.3g} s/step{speed}: about {expected} for the {left:,} steps "
            "left"
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints the line."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        text = format_line(logs, state.global_step, state.max_steps)
        if self._began is not None and state.global_step > self._began[1]:
            took = self._clock() - self._began[0]
            each = took / (state.global_step - self._began[1])
            text += f"  {each:.2f} s/step"
            if self._tokens:
                text += f"  {self._tokens / max(took, 1e-9):,.0f} tokens/s"
            text += f"  {hours_and_minutes(each * (state.max_steps - state.global_step))} left"
        self._say(text)

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:  # above the bar
            self._bar.write(text)


def format_line(logs: Mapping[str, float], step: int, steps: int) -> str:
    """The figures of one log line as text."""
    parts = [f"step {step}/{steps}", f"loss {float(logs['loss']):.4g}"]
    if "learning_rate" in logs:
        parts.append(f"lr {float(logs['learning_rate']):.3g}")
    exits = [name.partition("/")[2] for name in logs if name.startswith("loss/exit")]
    for name in sorted(exits, key=lambda text: int(text.removeprefix("exit"))):
        figures = [f"{name} loss {logs[f'loss/{name}']:.3f}"]
        if f"agree/{name}" in logs:
            figures.append(f"agree {logs[f'agree/{name}']:.1%}")
        if f"ece/{name}" in logs:
            figures.append(f"ece {logs[f'ece/{name}']:.3f}")
        parts.append(" ".join(figures))
    if "loss/teacher" in logs:
        parts.append(f"teacher loss {logs['loss/teacher']:.3f}")
    speed = logs.get("speed_at_99", math.nan)
    if math.isfinite(speed):
        parts.append(f"speed@99% {speed:.2f}")
    return "  ".join(parts)


@dataclass(frozen=True)
class Segments:
    """Content of ``wandb/segments.json``: the wandb id of each part of one run.

    `wandb sync` of a second offline folder with the same id erases the first (wandb #2423), so a
    resumed run logs under a new id, and all parts are in one wandb group.
    """

    group: str
    ids: list[str]


def next_segment(folder: Path, given: str | None) -> Segments:
    """The run's segments, the one that starts now last.

    Args:
        given: the id that the user's environment sets, if any.

    Raises:
        DeliberateError: `given` belongs to an earlier segment.
    """
    path = folder / SEGMENTS_NAME
    if path.is_file():
        past = read(Segments, path)
    else:
        name = re.sub(r"[^A-Za-z0-9_-]", "-", folder.name)[:40] or "run"
        past = Segments(f"{name}-{uuid.uuid4().hex[:8]}", [])
    if given in past.ids:
        raise DeliberateError(
            f"WANDB_RUN_ID={given} is the id of an earlier part of this run, which a second part "
            "of that id would erase when it is synchronised: unset it"
        )
    now = Segments(past.group, [*past.ids, given or f"{past.group}-{len(past.ids)}"])
    write_text(path, json.dumps(asdict(now), indent=1) + "\n")
    return now


@contextmanager
def logging_to(cfg: DictConfig, folder: Path, *, first: bool = True) -> Iterator[list[str]]:
    """Sets up the configured loggers until the block ends; yields Trainer's names of them.

    Args:
        first: this process logs; the others only get the names.
    """
    if cfg.logger.name != "wandb":
        yield []
        return
    if not first:
        yield ["wandb"]
        return
    # The user's environment variables win over the configuration.
    variable = os.environ.get
    segments = next_segment(folder, variable("WANDB_RUN_ID"))
    import wandb

    # Not by variables: wandb reads those once a process, and a sweep has several runs in one.
    wandb.init(
        project=variable("WANDB_PROJECT", cfg.logger.project),
        mode=variable("WANDB_MODE", cfg.logger.mode),
        dir=variable("WANDB_DIR", str(folder)),
        id=segments.ids[-1],
        group=variable("WANDB_RUN_GROUP", segments.group),
        name=variable("WANDB_NAME", folder.name),
    )
    try:
        yield ["wandb"]
    finally:
        wandb.finish()


@contextmanager
def variables(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
