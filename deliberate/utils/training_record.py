"""`run.json`, the record that a training run writes, as others read it.

Readers take the keys that they need: the file has more, and later releases may add to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import read

RECORD_NAME = "run.json"


@dataclass(frozen=True)
class JobRecord:
    """What a table over the jobs of a sweep needs.

    Attributes:
        overrides: of the command line.
        seconds: wall clock of training.
        history: log lines, oldest first.
    """

    overrides: list[str]
    seed: int
    seconds: float
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class ModelSettings:
    """`model` of the configuration; a checkpoint folder has fewer keys."""

    kind: str
    path: str | None = None
    keep_layers: list[int] | None = None


@dataclass(frozen=True)
class TrainerSettings:
    """`trainer` of the configuration."""

    tokens_per_step: int
    processes: int
    optimizer: str
    learning_rate: float
    decay_share: float


@dataclass(frozen=True)
class DataSettings:
    """`data` of the configuration: sources by name, and what share of the problems each gives."""

    weights: dict[str, float]


@dataclass(frozen=True)
class RunSettings:
    """The part of a run's configuration that its card shows."""

    model: ModelSettings
    recipe: dict[str, Any]
    trainer: TrainerSettings
    data: DataSettings


@dataclass(frozen=True)
class Versions:
    """Of the packages that a result depends on."""

    torch: str
    transformers: str


@dataclass(frozen=True)
class Machine:
    """The part of `kernels.backends.describe` that a card shows."""

    cpu: str
    cores: int
    versions: Versions


@dataclass(frozen=True)
class RunRecord:
    """What a model's card needs of a finished run; see `JobRecord`."""

    command: str
    recipe: str
    seed: int
    steps: int
    seconds: float
    config: RunSettings
    environment: Machine
    history: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def read_run(run: str | Path) -> RunRecord:
    """The record of a training run.

    Raises:
        DeliberateError: no `run.json`, or not one of ours.
    """
    path = Path(run) / RECORD_NAME
    if not path.is_file():
        raise DeliberateError(f"{path} is missing: name the output_dir of a training run")
    return read(RunRecord, path, others="ignore", finite=False)
