"""What an evaluation run writes: the whole result, and the files.

A run folder holds `results.json` (one `EvaluationResult`) and `problems.jsonl` (one
`ProblemRecord` a line, every mode's answer to that problem). Reading is strict: an unknown or
missing key, a wrong type or another schema version is a one-line error that names key and file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from deliberate.eval.runner.guarantees import BudgetInfo, CertifiedInfo
from deliberate.eval.runner.outcomes import Departure, ProblemRecord
from deliberate.eval.runner.summary import ModeSummary, completed
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_records import ADDED, decode, encode, read_text

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
PROBLEMS_FILE = "problems.jsonl"
PARTIAL_FILE = "problems.partial.jsonl"


class TaskInfo(TypedDict):
    """The task; `problems` is the number of records."""

    name: str
    split: str
    data_sha256: str
    problems: int


class ModelInfo(TypedDict):
    """What answered."""

    name: str
    sha256: str
    architecture: str
    num_layers: int
    exits: list[int]
    parameters: int


class LoadInfo(TypedDict):
    """Load of the machine around the run, in whatever form the runner samples it."""

    before: Any
    after: Any


@dataclass(frozen=True)
class EvaluationResult:
    """A whole run, without the single problems.

    `certified` and `budget` are the guarantees of runs with these modes; `departures` is where
    exact did not repeat dense.
    """

    name: str
    created: str
    task: TaskInfo
    model: ModelInfo
    config: dict[str, Any]
    config_sha256: str
    environment: dict[str, Any]
    load: LoadInfo
    warmup_seconds: float
    modes: dict[str, ModeSummary]
    notes: list[str]
    schema_version: int = SCHEMA_VERSION
    certified: CertifiedInfo | None = field(default=None, metadata=ADDED)
    budget: BudgetInfo | None = field(default=None, metadata=ADDED)
    departures: list[Departure] | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise DeliberateError(
                f"schema_version is {self.schema_version!r}, this version reads {SCHEMA_VERSION}"
            )
        try:
            datetime.fromisoformat(self.created)
        except (TypeError, ValueError) as error:
            raise DeliberateError(f"created = {self.created!r} is no ISO 8601 time") from error


def write_results(
    folder: str | Path, result: EvaluationResult, records: Sequence[ProblemRecord]
) -> None:
    """Writes both files, each whole or not at all; `results.json` comes last: the run is complete.
    `result.task["problems"]` must be the number of records."""
    folder = Path(folder)
    _check_count(result, records, "results")
    lines, summary = "".join(encode(r) + "\n" for r in records), encode(result, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PROBLEMS_FILE, lines)
    write_text(folder / RESULTS_FILE, summary)


def read_results(folder: str | Path) -> tuple[EvaluationResult, list[ProblemRecord]]:
    """Read what `write_results` wrote; every defect is a one-line `DeliberateError`."""
    path, lines = Path(folder) / RESULTS_FILE, Path(folder) / PROBLEMS_FILE
    if not path.is_file() and (Path(folder) / PARTIAL_FILE).is_file():
        raise DeliberateError(
            f"{folder} holds an unfinished run: repeat its `deliberate eval` command, which goes "
            "on from there"
        )
    result: EvaluationResult = decode(EvaluationResult, read_text(path), str(path))
    records: list[ProblemRecord] = [
        decode(ProblemRecord, line, f"{lines} line {number}")
        for number, line in enumerate(read_text(lines).split("\n"), start=1)
        if line
    ]
    _check_count(result, records, str(folder))
    return replace(result, modes=completed(result.modes, records)), records


def _check_count(result: EvaluationResult, records: Sequence[ProblemRecord], where: str) -> None:
    if result.task["problems"] != len(records):
        raise DeliberateError(
            f"{where}: task.problems is {result.task['problems']} "
            f"but {PROBLEMS_FILE} has {len(records)}"
        )
