"""What an evaluation run leaves behind: typed records, their summary, and the files.

A run folder holds `results.json` (one `EvaluationResult`) and `problems.jsonl` (one
`ProblemRecord` a line, every mode's answer to that problem). Reading is strict: an unknown or
missing key, a wrong type or another schema version is a one-line error that names key and file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from deliberate.errors import DeliberateError
from deliberate.eval.codec import decode, encode, read_text, write_atomically
from deliberate.eval.statistics import (
    Estimate,
    Interval,
    McNemar,
    Spread,
    bootstrap_ratio_of_medians,
    mcnemar_exact,
    paired_difference_interval,
    percentiles,
    wilson_interval,
)

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
PROBLEMS_FILE = "problems.jsonl"
MODE_ORDER = ("transformers", "dense", "exact", "threshold")


@dataclass(frozen=True)
class ModeOutcome:
    """One mode's answer to one problem.

    `tokens` are the generated ids with the end token where one was produced; `pieces` are the
    same tokens decoded one by one. The prompt pass yields the first token, so a decode of n
    tokens makes n - 1 steps, and these are what `layer_passes` and `layer_positions` count.

    Attributes:
        exit_layers: layer each token was chosen at (`num_layers` = full depth); may be empty for
            a mode that does not report it.
        confidences: confidence of each token where it was chosen; may be empty likewise.
        seconds: wall clock of prompt pass and decoding.
        prefill_seconds: the part of it until the first token.
        layer_passes: calls of a layer after the prompt pass, summed over layers; 0 = not counted.
        layer_positions: positions processed, summed over those calls.
        drafted: exact mode: tokens drafted at an exit.
        rejected: exact mode: drafts the full depth refused.
        finish: "stop" (end token) or "length" (cut off).
    """

    text: str
    predicted: str | None
    correct: bool
    tokens: list[int]
    pieces: list[str]
    exit_layers: list[int]
    confidences: list[float]
    seconds: float
    prefill_seconds: float
    layer_passes: int
    layer_positions: int
    drafted: int = 0
    rejected: int = 0
    finish: str = "stop"

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if len(self.pieces) != count:
            raise DeliberateError(f"pieces has {len(self.pieces)} entries for {count} tokens")
        for name in ("exit_layers", "confidences"):
            if len(getattr(self, name)) not in (0, count):
                raise DeliberateError(
                    f"{name} has {len(getattr(self, name))} entries for {count} tokens"
                )
        if not (0 <= self.prefill_seconds <= self.seconds and 0 < self.seconds < math.inf):
            raise DeliberateError(
                f"seconds = {self.seconds} and prefill_seconds = {self.prefill_seconds}: "
                "0 <= prefill_seconds <= seconds and 0 < seconds must hold"
            )
        if min(self.layer_passes, self.layer_positions) < 0:
            raise DeliberateError("layer_passes and layer_positions must not be negative")
        if not 0 <= self.rejected <= self.drafted:
            raise DeliberateError(f"rejected = {self.rejected} must be in 0..{self.drafted}")
        if self.finish not in ("stop", "length"):
            raise DeliberateError(f"finish = {self.finish!r} must be 'stop' or 'length'")

    @property
    def steps(self) -> int:
        """Decode steps: tokens after the first, which the prompt pass yields."""
        return max(0, len(self.tokens) - 1)

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per decode step, the prompt pass left out."""
        return 1000 * (self.seconds - self.prefill_seconds) / max(1, self.steps)

    @property
    def seconds_per_token(self) -> float:
        """Wall clock, prompt pass included, per generated token."""
        return self.seconds / max(1, len(self.tokens))


@dataclass(frozen=True)
class ProblemRecord:
    """One problem and what every mode that ran on it answered."""

    id: str
    question: str
    answer: str
    source: str
    difficulty: int | None
    subject: str | None
    prompt_tokens: int
    modes: dict[str, ModeOutcome]

    def __post_init__(self) -> None:
        if not self.modes:
            raise DeliberateError(f"problem {self.id!r} has no outcome of any mode")


@dataclass(frozen=True)
class Comparison:
    """A mode against a baseline, on the `problems` that both ran.

    Attributes:
        identical: problems on which the two token sequences are equal.
        token_agreement: tokens before the first difference, over the longer of the two answers,
            both summed over problems. What follows a difference has another context and counts
            as disagreement even where a token happens to be the same.
        speedup: median seconds per token of the baseline over the mode's, prompt pass included;
            above 1 = the mode is faster.
        time_ratio: total seconds of the baseline over the mode's. It tells a faster answer from
            a longer answer of faster tokens.
        accuracy_difference: accuracy of the mode minus the baseline's, Newcombe's paired interval.
    """

    problems: int
    identical: int
    token_agreement: float
    speedup: Estimate
    time_ratio: float
    accuracy_difference: float
    accuracy_difference_interval: Interval
    mcnemar: McNemar


@dataclass(frozen=True)
class GroupRow:
    """A mode on the problems of one difficulty or subject."""

    group: str
    total: int
    correct: int
    interval: Interval
    mean_exit_layer: float | None
    layers_per_token: float | None


@dataclass(frozen=True)
class ModeSummary:
    """A mode on all problems it ran. None = not reported by the mode.

    `layers_per_token` is layer calls over decode steps (one pass over m positions is one call),
    `positions_per_token` the positions in those calls over decode steps; `acceptance_rate` is
    1 - rejected / drafted; `truncated` counts answers that met the length limit.
    """

    total: int
    correct: int
    accuracy: float
    accuracy_interval: Interval
    seconds_total: float
    seconds: Spread
    ms_per_token: Spread
    tokens: int
    tokens_per_second: float
    layers_per_token: float | None
    positions_per_token: float | None
    mean_exit_layer: float | None
    exit_histogram: dict[int, int]
    acceptance_rate: float | None
    truncated: int
    versus_dense: Comparison | None
    versus_transformers: Comparison | None
    by_difficulty: list[GroupRow]
    by_subject: list[GroupRow]


class TaskInfo(TypedDict):
    """What was asked; `problems` is the number of records."""

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
    """A whole run, without the single problems."""

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

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise DeliberateError(
                f"schema_version is {self.schema_version!r}, this version reads {SCHEMA_VERSION}"
            )
        try:
            datetime.fromisoformat(self.created)
        except (TypeError, ValueError) as error:
            raise DeliberateError(f"created = {self.created!r} is no ISO 8601 time") from error


def summarise(records: Sequence[ProblemRecord], *, num_layers: int) -> dict[str, ModeSummary]:
    """Summaries of every mode that occurs, in reading order (`MODE_ORDER`, then by name).

    A mode may cover some of the problems only; comparisons use the problems both modes ran.

    Raises:
        DeliberateError: no records, a repeated id, or an exit layer outside 1..num_layers.
    """
    if not records:
        raise DeliberateError("no problems to summarise: at least one record is needed")
    repeated = [name for name, count in Counter(r.id for r in records).items() if count > 1]
    if repeated:
        raise DeliberateError(f"problem id {repeated[0]!r} occurs more than once")
    for record in records:
        for mode, outcome in record.modes.items():
            outside = [layer for layer in outcome.exit_layers if not 1 <= layer <= num_layers]
            if outside:
                raise DeliberateError(
                    f"problem {record.id!r}, {mode}: "
                    f"exit layer {outside[0]} is not in 1..{num_layers}"
                )
    present = {mode for record in records for mode in record.modes}
    ordered = [m for m in MODE_ORDER if m in present] + sorted(present - set(MODE_ORDER))
    return {mode: _summarise_mode(mode, records) for mode in ordered}


def _summarise_mode(mode: str, records: Sequence[ProblemRecord]) -> ModeSummary:
    covered = [record for record in records if mode in record.modes]
    outcomes = [record.modes[mode] for record in covered]
    timed = [
        o for o in outcomes if o.tokens
    ] or outcomes  # no tokens: the prompt filled the context
    correct = sum(o.correct for o in outcomes)
    tokens, seconds = sum(len(o.tokens) for o in outcomes), sum(o.seconds for o in outcomes)
    drafted = sum(o.drafted for o in outcomes)
    difficulties = sorted({r.difficulty for r in covered if r.difficulty is not None})
    subjects = sorted({r.subject for r in covered if r.subject is not None})
    return ModeSummary(
        total=len(outcomes),
        correct=correct,
        accuracy=correct / len(outcomes),
        accuracy_interval=wilson_interval(correct, len(outcomes)),
        seconds_total=seconds,
        seconds=percentiles([o.seconds for o in timed]),
        ms_per_token=percentiles([o.ms_per_token for o in timed]),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        layers_per_token=_per_step(outcomes, [o.layer_passes for o in outcomes]),
        positions_per_token=_per_step(outcomes, [o.layer_positions for o in outcomes]),
        mean_exit_layer=_mean_exit_layer(outcomes),
        exit_histogram=dict(sorted(Counter(x for o in outcomes for x in o.exit_layers).items())),
        acceptance_rate=1 - sum(o.rejected for o in outcomes) / drafted if drafted else None,
        truncated=sum(o.finish == "length" for o in outcomes),
        versus_dense=_compare(mode, "dense", records),
        versus_transformers=_compare(mode, "transformers", records),
        by_difficulty=[_group(mode, covered, "difficulty", d) for d in difficulties],
        by_subject=[_group(mode, covered, "subject", s) for s in subjects],
    )


def _per_step(outcomes: Iterable[ModeOutcome], counts: Sequence[int]) -> float | None:
    steps = sum(outcome.steps for outcome in outcomes)
    return sum(counts) / steps if steps and sum(counts) else None


def _mean_exit_layer(outcomes: Iterable[ModeOutcome]) -> float | None:
    layers = [layer for outcome in outcomes for layer in outcome.exit_layers]
    return sum(layers) / len(layers) if layers else None


def _group(mode: str, records: Iterable[ProblemRecord], key: str, value: int | str) -> GroupRow:
    outcomes = [record.modes[mode] for record in records if getattr(record, key) == value]
    correct = sum(outcome.correct for outcome in outcomes)
    return GroupRow(
        group=str(value),
        total=len(outcomes),
        correct=correct,
        interval=wilson_interval(correct, len(outcomes)),
        mean_exit_layer=_mean_exit_layer(outcomes),
        layers_per_token=_per_step(outcomes, [o.layer_passes for o in outcomes]),
    )


def _compare(mode: str, baseline: str, records: Sequence[ProblemRecord]) -> Comparison | None:
    pairs = [
        (r.modes[mode], r.modes[baseline])
        for r in records
        if mode in r.modes and baseline in r.modes
    ]
    if mode == baseline or not pairs:
        return None
    timed = [(a, b) for a, b in pairs if a.tokens and b.tokens] or pairs
    table = Counter((a.correct, b.correct) for a, b in pairs)
    gained, lost = table[True, False], table[False, True]
    longest = sum(max(len(a.tokens), len(b.tokens)) for a, b in pairs)
    prefix = sum(first_difference(a.tokens, b.tokens) for a, b in pairs)
    return Comparison(
        problems=len(pairs),
        identical=sum(a.tokens == b.tokens for a, b in pairs),
        token_agreement=prefix / longest if longest else 1.0,
        speedup=bootstrap_ratio_of_medians(
            [b.seconds_per_token for _, b in timed], [a.seconds_per_token for a, _ in timed]
        ),
        time_ratio=sum(b.seconds for _, b in pairs) / sum(a.seconds for a, _ in pairs),
        accuracy_difference=(gained - lost) / len(pairs),
        accuracy_difference_interval=paired_difference_interval(
            table[True, True], gained, lost, table[False, False]
        ),
        mcnemar=mcnemar_exact(b=lost, c=gained),
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def write_results(
    folder: str | Path, result: EvaluationResult, records: Sequence[ProblemRecord]
) -> None:
    """Writes both files, each whole or not at all; `results.json` comes last: the run is complete.
    `result.task["problems"]` must be the number of records."""
    folder = Path(folder)
    _check_count(result, records, "results")
    lines, summary = "".join(encode(r) + "\n" for r in records), encode(result, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PROBLEMS_FILE, lines)
    write_atomically(folder / RESULTS_FILE, summary)


def read_results(folder: str | Path) -> tuple[EvaluationResult, list[ProblemRecord]]:
    """Read what `write_results` wrote; every defect is a one-line `DeliberateError`."""
    path, lines = Path(folder) / RESULTS_FILE, Path(folder) / PROBLEMS_FILE
    result: EvaluationResult = decode(EvaluationResult, read_text(path), str(path))
    records: list[ProblemRecord] = [
        decode(ProblemRecord, line, f"{lines} line {number}")
        for number, line in enumerate(read_text(lines).split("\n"), start=1)
        if line
    ]
    _check_count(result, records, str(folder))
    return result, records


def _check_count(result: EvaluationResult, records: Sequence[ProblemRecord], where: str) -> None:
    if result.task["problems"] != len(records):
        raise DeliberateError(
            f"{where}: task.problems is {result.task['problems']} "
            f"but {PROBLEMS_FILE} has {len(records)}"
        )
