"""What the continuations of `deliberate bench longtext` come to: figures, differences, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deliberate.eval.benchmarks.repetition import Judge, Verdict, distinct, repetition, words
from deliberate.eval.grading.graders import grade
from deliberate.eval.statistics import (
    BOOTSTRAP_RESAMPLES,
    Estimate,
    Interval,
    bootstrap_ratio_of_medians,
)

WITHOUT = "without"
"""The variant that all others are compared with."""

GRAMS = (2, 3, 4)


@dataclass(frozen=True)
class Start:
    """What is continued.

    Attributes:
        ids, text: the prompt.
        document: how the document goes on, None of a word problem.
        answer: of a word problem, where it is graded.
    """

    ids: list[int]
    text: str
    document: str | None = None
    answer: str | None = None


@dataclass
class Taken:
    """One variant over all prompts: a number of each for every prompt."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    triggers: list[int] = field(default_factory=list)
    reweighed: list[int] = field(default_factory=list)


def mean_difference(
    a: Sequence[float], b: Sequence[float], seed: int, resamples: int = BOOTSTRAP_RESAMPLES
) -> Estimate:
    """mean(a - b) with a percentile bootstrap over pairs; pairs with a NaN are left out."""
    gaps = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    gaps = gaps[np.isfinite(gaps)]
    if len(gaps) == 0:
        return Estimate(float("nan"), None)
    value = float(gaps.mean())
    if len(gaps) < 2:
        return Estimate(value, None)
    random_ = np.random.default_rng(seed)
    means = gaps[random_.integers(0, len(gaps), size=(resamples, len(gaps)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(value, Interval(min(float(low), value), max(float(high), value)))


def summarise(
    taken: Mapping[str, Taken], starts: Sequence[Start], judge: Judge, seed: int
) -> dict[str, Any]:
    """Figures of every variant, JSON-ready, with differences from the one without anything."""
    # Variants that make the same text of a prompt are judged once.
    judged: dict[tuple[str, str], Verdict] = {}
    scores = {name: _scores(one, starts, judge, judged) for name, one in taken.items()}
    rows: dict[str, Any] = {}
    for name, one in taken.items():
        split = [words(text) for text in one.texts]
        made = sum(one.tokens)
        row: dict[str, Any] = {
            "texts": len(one.texts),
            "tokens": made,
            "same_as_without": sum(
                a == b for a, b in zip(one.texts, taken[WITHOUT].texts, strict=True)
            ),
            "words": float(np.mean(list(map(len, split)))),
            "distinct": {str(n): distinct(split, n) for n in (1, 2)},
            "triggers_per_100": 100 * sum(one.triggers) / made,
            "reweighed": sum(one.reweighed) / made,
            "ms_per_token": 1000 * float(np.median(one.seconds)),
            "example": one.texts[0],
        }
        for measure, values in scores[name].items():
            row[measure] = _finite_mean(values)
            if name != WITHOUT:
                gap = mean_difference(values, scores[WITHOUT][measure], seed)
                row[f"{measure} difference"] = _listed(gap)
        if name != WITHOUT:
            ratio = bootstrap_ratio_of_medians(one.seconds, taken[WITHOUT].seconds, seed)
            row["time"] = _listed(ratio)
        rows[name] = row
    return rows


def _scores(
    one: Taken, starts: Sequence[Start], judge: Judge, judged: dict[tuple[str, str], Verdict]
) -> dict[str, list[float]]:
    """Every measure of every text; `judged` has the verdicts so far, by prompt and text."""
    split = [words(text) for text in one.texts]
    found = {f"rep-{n}": [repetition(text, n) for text in split] for n in GRAMS}
    places = [(start.text, text) for start, text in zip(starts, one.texts, strict=True)]
    for place in places:
        if place not in judged:
            judged[place] = judge.verdict(*place)
    verdicts = [judged[place] for place in places]
    reads: Mapping[str, Callable[[Verdict], float]] = {
        "likelihood": lambda verdict: verdict.likelihood,
        "fresh": lambda verdict: verdict.fresh,
        "coherence": lambda verdict: verdict.coherence,
    }
    found |= {name: list(map(read, verdicts)) for name, read in reads.items()}
    if all(start.answer is not None for start in starts):
        found["solved"] = [
            float(grade(text, start.answer or "", "gsm8k").correct)
            for start, text in zip(starts, one.texts, strict=True)
        ]
    return found


def _finite_mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def _listed(estimate: Estimate) -> list[float | None]:
    """Value, low, high."""
    interval = estimate.interval
    value = estimate.value if np.isfinite(estimate.value) else None
    return [value, *((None, None) if interval is None else (interval.low, interval.high))]


def show(mode: str, rows: Mapping[str, Any], console: Console) -> None:
    """Prints the variants of a mode as three tables."""
    first = next(iter(rows.values()))
    title = f"{mode}: repetition in %, {first['texts']} texts"
    columns = ["rep-2", "rep-3", "rep-4", "difference", "distinct-1, 2"]
    columns += ["solved"] * ("solved" in first)
    table = _table(title, columns)
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{100 * row[f'rep-{n}']:.1f}" for n in GRAMS),
            _interval(row.get("rep-4 difference"), 100, ".1f"),
            "{:.2f}, {:.2f}".format(*row["distinct"].values()),
            *([f"{100 * row['solved']:.1f} %"] if "solved" in row else []),
        )
    console.print(table)
    title = f"{mode}: nats per character by the judge"
    table = _table(title, ["all", "fresh", "difference", "coherence", "difference"])
    for name, row in rows.items():
        table.add_row(
            name,
            _number(row["likelihood"]),
            _number(row["fresh"]),
            _interval(row.get("fresh difference"), 1, ".3f"),
            _number(row["coherence"]),
            _interval(row.get("coherence difference"), 1, ".3f"),
        )
    console.print(table)
    title = f"{mode}: time per token, and the watch"
    columns = ["ms", "times without", "triggers per 100", "re-weighed", "same text"]
    table = _table(title, columns)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['ms_per_token']:.2f}",
            _interval(row.get("time"), 1, ".2f"),
            f"{row['triggers_per_100']:.2f}",
            f"{100 * row['reweighed']:.0f} %",
            str(row["same_as_without"]),
        )
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(listed: Sequence[float | None] | None, scale: float, form: str) -> str:
    if listed is None or listed[0] is None:
        return "-"
    text = f"{scale * listed[0]:{form}}"
    low, high = listed[1:]
    if low is None or high is None:
        return text
    return f"{text} [{scale * low:{form}}, {scale * high:{form}}]"
