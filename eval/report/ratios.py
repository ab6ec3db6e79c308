"""Recomputes the ratios of an evaluation from its stored times: `python -m
deliberate.eval.report.ratios`.

A run's folder holds every answer; what is quoted of it needs six numbers a problem and mode. This
module keeps those in one small file, and computes from it what a page may quote: the median time
per token with and without the prompt pass, and the ratio to dense of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deliberate.eval.runner.results import read_results
from deliberate.eval.statistics import bootstrap_ratio_of_medians
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read

BASELINE = "dense"


@dataclass(frozen=True)
class Times:
    """One mode's answers, by problem.

    Attributes:
        problems: numbers of the problems that it answered, rising.
        tokens: generated, the end token included.
        seconds: wall clock of the whole call, prompt pass included.
        prefill_seconds: the part of it until the first token.
        correct: whether the answer was right.
        same: whether its tokens are dense's.
    """

    problems: list[int]
    tokens: list[int]
    seconds: list[float]
    prefill_seconds: list[float]
    correct: list[bool]
    same: list[bool]

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in asdict(self).items()}
        if set(sizes.values()) != {len(self.problems)}:
            raise DeliberateError(f"one value of each a problem is needed, got {sizes}")
        if not self.problems or min(self.tokens) < 1:
            raise DeliberateError("every mode needs an answer of at least one token")

    def whole_ms(self) -> list[float]:
        """Milliseconds per generated token, prompt pass included."""
        return [1000 * s / n for s, n in zip(self.seconds, self.tokens, strict=True)]

    def step_ms(self) -> list[float]:
        """Milliseconds per decode step (a token after the first), prompt pass left out."""
        both = zip(self.seconds, self.prefill_seconds, self.tokens, strict=True)
        return [1000 * (s - p) / max(1, n - 1) for s, p, n in both]


@dataclass(frozen=True)
class StoredTimes:
    """The times of one run.

    Attributes:
        name: of the run: model and task.
        created: ISO time.
        command: what made it.
        machine: processor, threads, versions, load before and after; JSON-ready.
        modes: times by mode; `BASELINE` is among them.
    """

    name: str
    created: str
    command: str
    machine: dict[str, Any]
    modes: dict[str, Times]

    def __post_init__(self) -> None:
        if BASELINE not in self.modes:
            raise DeliberateError(f"no times of {BASELINE}, which ratios are to")


@dataclass(frozen=True)
class Row:
    """What may be quoted of a mode; ratios are of medians, above 1 = faster than dense.

    Attributes:
        whole_ms, step_ms: median milliseconds per token with, per step without the prompt pass.
        whole_ratio, step_ratio: dense's over the mode's, on problems that both answered.
        low, high: 95 % bootstrap interval of `whole_ratio`; None for fewer than two problems.
        correct, same, total: problems.
    """

    whole_ms: float
    step_ms: float
    whole_ratio: float
    step_ratio: float
    low: float | None
    high: float | None
    correct: int
    same: int
    total: int


def stored(folder: str | Path, command: str) -> StoredTimes:
    """The times of an evaluation's folder."""
    result, records = read_results(folder)
    modes: dict[str, Times] = {}
    for mode in result.modes:
        answered = [(n, r, r.modes[mode]) for n, r in enumerate(records) if mode in r.modes]
        modes[mode] = Times(
            problems=[n for n, _, _ in answered],
            tokens=[len(o.tokens) for _, _, o in answered],
            seconds=[round(o.seconds, 6) for _, _, o in answered],
            prefill_seconds=[round(o.prefill_seconds, 6) for _, _, o in answered],
            correct=[o.correct for _, _, o in answered],
            same=[
                BASELINE in r.modes and o.tokens == r.modes[BASELINE].tokens for _, r, o in answered
            ],
        )
    kept = ("cpu", "cores", "threads", "versions", "deliberate")
    machine = {name: result.environment[name] for name in kept if name in result.environment}
    machine["load"] = dict(result.load)
    return StoredTimes(result.name, result.created, command, machine, modes)


def ratios(times: StoredTimes) -> dict[str, Row]:
    """What may be quoted of every mode."""
    base = times.modes[BASELINE]
    places = {problem: place for place, problem in enumerate(base.problems)}
    rows = {}
    for mode, own in times.modes.items():
        both = [(places[p], k) for k, p in enumerate(own.problems) if p in places]
        if not both:
            raise DeliberateError(f"{mode} and {BASELINE} have no problem in common")

        def pairs(name: str, own: Times = own, both: Any = both) -> tuple[list[float], list[float]]:
            theirs, mine = getattr(base, name)(), getattr(own, name)()
            return [theirs[a] for a, _ in both], [mine[b] for _, b in both]

        whole = bootstrap_ratio_of_medians(*pairs("whole_ms"))
        first, second = pairs("step_ms")
        rows[mode] = Row(
            whole_ms=statistics.median(own.whole_ms()),
            step_ms=statistics.median(own.step_ms()),
            whole_ratio=whole.value,
            step_ratio=statistics.median(first) / statistics.median(second),
            low=whole.interval.low if whole.interval else None,
            high=whole.interval.high if whole.interval else None,
            correct=sum(own.correct),
            same=sum(own.same),
            total=len(own.problems),
        )
    return rows


def table(rows: Mapping[str, Row]) -> str:
    """Markdown that says in every column what it includes."""
    lines = [
        "| mode | right | ms per token, prompt pass included | the same against dense | "
        "ms per step, prompt pass left out | the same against dense | same tokens as dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, row in rows.items():
        own = mode == BASELINE
        interval = "" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
        lines.append(
            f"| {mode} | {row.correct} of {row.total} | {row.whole_ms:.2f} | "
            f"{'1' if own else f'{row.whole_ratio:.2f}x{interval}'} | {row.step_ms:.2f} | "
            f"{'1' if own else f'{row.step_ratio:.2f}x'} | "
            f"{'-' if own else f'{row.same} of {row.total}'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a stored file, or of an evaluation's folder, which it can also store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="stored times, or a folder")
    parser.add_argument("--store", type=Path, help="write the folder's times to this file")
    parser.add_argument("--command", default="", help="the command that made the folder")
    given = parser.parse_args(arguments)
    try:
        if given.source.is_dir():
            times = stored(given.source, given.command)
        else:
            times = read(StoredTimes, given.source)
        if given.store is not None:
            write_text(given.store, json.dumps(asdict(times)) + "\n")
        print(table(ratios(times)))
    except DeliberateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
