"""Figures and tables of `deliberate bench throughput`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deliberate.eval.benchmarks.throughput_load import Load
from deliberate.eval.benchmarks.throughput_servers import Served
from deliberate.eval.statistics import Estimate, bootstrap_ratio_of_medians

# Ratios that are quoted: variant, against what.
PAIRS = (
    ("engine dense", "transformers continuous"),
    ("engine dense", "transformers static"),
    ("engine dense", "static dense"),
    ("engine exact", "engine dense"),
    ("engine exact", "transformers continuous"),
    ("engine dense", "engine dense, unshared"),
    ("static dense", "transformers static"),
)
# Whose tokens must be equal: all of them decode the greedy answer at full depth.
REFERENCES = ("engine dense", "static dense", "transformers static", "transformers continuous")


@dataclass
class Rounds:
    """One variant's rounds of one load.

    Attributes:
        seconds: of each round, from the first arrival to the last token.
        processor: seconds of this process's own time in each round, all threads.
        first: seconds from arrival to the first token, one list a round.
        between: seconds from one token to the next, of all rounds.
        whole: seconds from arrival to the last token, of all rounds.
        last: what the last round served.
        failure: what its library raised; None where it served every round.
    """

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    last: Served | None = None
    failure: str | None = None

    def add(self, load: Load, served: Served) -> None:
        """Takes a round."""
        self.processor.append(served.processor)
        self.seconds.append(max(times[-1] for times in served.times))
        self.first.append(
            [times[0] - call.arrival for call, times in zip(load.calls, served.times, strict=True)]
        )
        self.whole += [
            times[-1] - call.arrival for call, times in zip(load.calls, served.times, strict=True)
        ]
        for times in served.times:
            self.between += np.diff(times).tolist()
        self.last = served

    @property
    def first_tokens(self) -> list[float]:
        """Of each request, the median over the rounds."""
        return [float(value) for value in np.median(np.asarray(self.first), axis=0)]


def report(load: Load, rounds: Mapping[str, Rounds], token_bytes: int, seed: int) -> dict[str, Any]:
    """Figures of a load, JSON-ready: per variant, and the ratios that are quoted."""
    rows = {name: _row(load, own, token_bytes) for name, own in rounds.items()}
    reference = next((name for name in REFERENCES if _served(rounds.get(name))), None)
    if reference is not None:
        dense = _tokens(rounds[reference])
        for name, own in rounds.items():
            if own.failure is None:
                same = sum(a == b for a, b in zip(_tokens(own), dense, strict=True))
                rows[name]["identical"] = same
    ratios = []
    for fast, slow in PAIRS:
        if _served(rounds.get(fast)) and _served(rounds.get(slow)):
            one, other = rounds[fast], rounds[slow]
            speedup = bootstrap_ratio_of_medians(other.seconds, one.seconds, seed=seed)
            own_time = bootstrap_ratio_of_medians(other.processor, one.processor, seed=seed)
            first = bootstrap_ratio_of_medians(other.first_tokens, one.first_tokens, seed=seed)
            ratios.append(
                {
                    "variant": fast,
                    "against": slow,
                    "throughput": _estimate(speedup),
                    "processor": _estimate(own_time),
                    "first_token": _estimate(first),
                }
            )
    return {
        "requests": len(load.calls),
        "at_a_time": load.at_a_time,
        "prompt_tokens": sum(len(call.prompt) for call in load.calls),
        "answer_tokens": load.tokens,
        "last_arrival": load.calls[-1].arrival,
        "identical_to": reference,
        "variants": rows,
        "ratios": ratios,
    }


def _served(rounds: Rounds | None) -> bool:
    return rounds is not None and rounds.failure is None and bool(rounds.seconds)


def _tokens(rounds: Rounds) -> Sequence[Sequence[int]]:
    return [] if rounds.last is None else rounds.last.tokens


def _estimate(estimate: Estimate) -> dict[str, Any]:
    interval = estimate.interval
    ends = None if interval is None else [interval.low, interval.high]
    return {"value": estimate.value, "interval": ends}


def _row(load: Load, rounds: Rounds, token_bytes: int) -> dict[str, Any]:
    if rounds.failure is not None or rounds.last is None:
        return {"failure": rounds.failure or "not run"}
    last = rounds.last
    prompts = sum(len(call.prompt) for call in load.calls)
    first = [second for own in rounds.first for second in own]
    row: dict[str, Any] = {
        "tokens_per_second": [load.tokens / seconds for seconds in rounds.seconds],
        "tokens_per_processor_second": [load.tokens / seconds for seconds in rounds.processor],
        "first_token_ms": _percentiles(first),
        "between_tokens_ms": _percentiles(rounds.between),
        "answer_ms": _percentiles(rounds.whole),
        "layers_per_token": float(np.mean(last.layers)) if last.layers else None,
        "prefilled": last.prefilled,
        "prefill_saved": None if last.prefilled is None else 1 - last.prefilled / prompts,
        "kv_bytes": last.kv_bytes,
        "kv_over_own": None,
        "notes": last.notes,
    }
    if last.kv_bytes is not None and last.kv_tokens:
        row["kv_over_own"] = last.kv_bytes / (last.kv_tokens * token_bytes)
    return row


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    values = 1000 * np.percentile(np.asarray(seconds or [0.0]), [50, 90, 99])
    return {"p50": float(values[0]), "p90": float(values[1]), "p99": float(values[2])}


def show(name: str, figures: Mapping[str, Any], console: Console) -> None:
    """Prints a load as two tables."""
    title = f"{name}: {figures['requests']} requests, {figures['at_a_time']} at a time at most"
    if figures["last_arrival"]:
        title += f", arriving over {figures['last_arrival']:.1f} s"
    table = Table(title=title)
    table.add_column("variant", no_wrap=True)
    times = ("first token ms, P50", "P90", "P99", "between ms, P50", "P99", "whole ms, P50", "P90")
    columns = ("tokens/s", "of own time", *times, "P99")
    for column in (*columns, "layers/token", "prefill saved", "KV / own", "same"):
        table.add_column(column, justify="right")
    failures = []
    for variant, row in figures["variants"].items():
        if "failure" in row:
            table.add_row(variant, "failed")
            failures.append(f"{variant} failed: {row['failure']}")
            continue
        first, between, whole = (
            row[f"{of}_ms"] for of in ("first_token", "between_tokens", "answer")
        )
        saved = row["prefill_saved"]
        table.add_row(
            variant,
            f"{float(np.median(row['tokens_per_second'])):,.0f}",
            f"{float(np.median(row['tokens_per_processor_second'])):,.0f}",
            *(f"{first[at]:,.0f}" for at in ("p50", "p90", "p99")),
            f"{between['p50']:.2f}",
            f"{between['p99']:.1f}",
            *(f"{whole[at]:,.0f}" for at in ("p50", "p90", "p99")),
            _number(row["layers_per_token"]),
            "-" if saved is None else f"{100 * saved:.1f} %",
            _number(row["kv_over_own"]),
            f"{row.get('identical', '-')} of {figures['requests']}",
        )
    console.print(table)
    for failure in failures:
        console.print(failure, markup=False, soft_wrap=True)
    ratios = Table(title=f"{name}: ratios [95 % interval]")
    for column in ("variant", "against", "throughput", "processor time", "time to first token"):
        ratios.add_column(column)
    for ratio in figures["ratios"]:
        ratios.add_row(
            ratio["variant"],
            ratio["against"],
            f"{_spread(ratio['throughput'])} the tokens/s",
            f"{_spread(ratio['processor'])} less",
            f"{_spread(ratio['first_token'])} sooner",
        )
    if figures["ratios"]:
        console.print(ratios)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(estimate: Mapping[str, Any]) -> str:
    text = f"{estimate['value']:.2f}x"
    if estimate["interval"] is not None:
        low, high = estimate["interval"]
        text += f" [{low:.2f}, {high:.2f}]"
    return text
