"""Where the figures of a run go while it trains: console, a CSV file, wandb."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deliberate import storage

CSV_NAME = "metrics.csv"


class CsvLog(TrainerCallback):
    """One row a log line in ``metrics.csv``: step, loss, learning rate and every figure by exit.

    The columns are those of the first line. A resumed run first writes the rows again that its
    checkpoint remembers, so that what a killed run wrote after it does not stand twice.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CSV_NAME
        self._columns: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the file with what was logged before the checkpoint."""
        if not state.is_world_process_zero:
            return
        past = [line for line in state.log_history if "loss" in line]
        self._columns = _columns(past[0]) if past else []
        text = _rows([dict(zip(self._columns, self._columns, strict=True)), *past], self._columns)
        storage.write_text(self.path, text if past else "")

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
    """One readable line a log line.

    ``step 40/600  loss 1.234  lr 0.004  exit2 loss 1.5 agree 81% ece 0.03  ...  speed@99% 1.31``
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock with the first step of this process."""
        if self._began is None:
            self._began = self._clock(), state.global_step

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
            each = (self._clock() - self._began[0]) / (state.global_step - self._began[1])
            text += f"  {each:.2f} s/step"
        print(text, flush=True)


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


@contextmanager
def logging_to(cfg: DictConfig, folder: Path) -> Iterator[list[str]]:
    """Trainer's names of the configured loggers, set up for this run and ended with it."""
    if cfg.logger.name != "wandb":
        yield []
        return
    settings = {
        "WANDB_MODE": cfg.logger.mode,
        "WANDB_PROJECT": cfg.logger.project,
        "WANDB_DIR": str(folder),
    }
    # What the user's environment says goes before the configuration.
    with variables({name: os.environ.get(name, value) for name, value in settings.items()}):
        import wandb

        try:
            yield ["wandb"]
        finally:
            wandb.finish()


@contextmanager
def variables(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of a block."""
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
