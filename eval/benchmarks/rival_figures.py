"""Figures, tables and picture of `deliberate bench rivals`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from deliberate.eval.report.figures import mode_colour, render
from deliberate.eval.statistics import bootstrap_ratio_of_medians


@dataclass(frozen=True)
class Variant:
    """A system at a precision by so many threads."""

    system: str
    precision: str
    threads: int

    @property
    def name(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return f"{self.system}, {self.precision}, {self.threads} thread{plural}"


@dataclass
class Answers:
    """What one variant did.

    Attributes:
        tokens: of each counted prompt.
        seconds: of each, prompt pass included, by the wall clock.
        own: the same of its process's own time.
        decode, decode_own: of each, without the prompt pass and the first token, which were timed
            by another answer of one token.
        prefill, prefill_own: of the long prompt with one token, each round.
        memory: most bytes that its process held beyond those with its library imported and no
            model loaded.
        failure: what went wrong, in one line.
    """

    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    decode_own: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    prefill_own: list[float] = field(default_factory=list)
    memory: int | None = None
    failure: str | None = None

    def add(self, found: Mapping[str, Any], wanted: int, *, counted: bool) -> None:
        """Takes an answer; one of another length than all others is a failure."""
        self.failure = found.get("failed")
        if self.failure is None and len(found["tokens"]) != wanted:
            self.failure = f"{len(found['tokens'])} tokens where {wanted} were asked for"
        if self.failure is None and counted:
            self.tokens.append(list(found["tokens"]))
            self.seconds.append(found["seconds"])
            self.own.append(found["own"])

    def add_first(self, found: Mapping[str, Any], *, counted: bool) -> None:
        """Takes the same prompt's answer of one token, after `add`."""
        self.failure = found.get("failed")
        if self.failure is None and counted:
            self.decode.append(self.seconds[-1] - found["seconds"])
            self.decode_own.append(self.own[-1] - found["own"])

    def add_prefill(self, found: Mapping[str, Any], *, counted: bool) -> None:
        """Takes a round of the long prompt."""
        self.failure = found.get("failed")
        if self.failure is None and counted:
            self.prefill.append(found["seconds"])
            self.prefill_own.append(found["own"])


# Ratios that are quoted, one after the other at every number of threads: system and precision,
# against which. An empty precision stands for each.
PAIRS = (
    ("dense", "float32", "transformers", "float32"),
    ("dense", "bfloat16", "transformers", "bfloat16"),
    ("dense", "int8", "transformers", "float32"),
    ("dense", "4 bit", "llama.cpp", "4 bit"),
    ("exact lookup", "", "dense", ""),
    ("exact layer", "", "dense", ""),
    ("exact int4", "", "dense", ""),
    ("exact int4", "", "exact layer", ""),
    ("exact lookup", "float32", "transformers lookup", "float32"),
    ("exact lookup", "float32", "transformers early exit", "float32"),
    ("exact layer", "float32", "transformers lookup", "float32"),
    ("exact layer", "float32", "transformers early exit", "float32"),
    ("exact lookup", "4 bit", "llama.cpp lookup", "4 bit"),
)
# Whose tokens must be those of which, at the same precision: they decode the same greedy answer.
# Libraries compute smaller weights in their own ways, so across them only float32 is compared.
SAME = {
    "exact lookup": "dense",
    "exact layer": "dense",
    "exact int4": "dense",
    "transformers lookup": "transformers",
    "transformers early exit": "transformers",
    "llama.cpp lookup": "llama.cpp",
}


def report(
    answers: Mapping[Variant, Answers], absent: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """All figures, JSON-ready: rows of variants, ratios, and what is missing or failed."""
    rows = []
    for variant, own in answers.items():
        row: dict[str, Any] = {
            "variant": variant.name,
            "system": variant.system,
            "precision": variant.precision,
            "threads": variant.threads,
            "prompts": len(own.tokens),
        }
        if own.failure is not None or not own.seconds:
            rows.append(row | {"failure": own.failure or "not measured"})
            continue
        count = len(own.tokens[0])
        row |= {
            "ms_per_token": 1e3 * median(own.seconds) / count,
            "own_ms_per_token": 1e3 * median(own.own) / count,
            "ms_per_token_range": [1e3 * pick(own.seconds) / count for pick in (min, max)],
            "decode_ms_per_token": 1e3 * median(own.decode) / (count - 1),
            "decode_own_ms_per_token": 1e3 * median(own.decode_own) / (count - 1),
            "prefill_ms": 1e3 * median(own.prefill) if own.prefill else None,
            "prefill_own_ms": 1e3 * median(own.prefill_own) if own.prefill_own else None,
            "peak_bytes": own.memory,
        }
        other = _reference(variant, answers)
        if other is not None:
            row["same_as"] = other.system
            pairs = zip(own.tokens, answers[other].tokens, strict=True)
            row["same"] = sum(mine == theirs for mine, theirs in pairs)
        rows.append(row)
    return {
        "variants": rows,
        "ratios": [one for pair in PAIRS for one in _ratios(pair, answers, seed)],
        "decode_ratios": [
            one for pair in PAIRS for one in _ratios(pair, answers, seed, decode=True)
        ],
        "prefill_ratios": _prefill_ratios(answers, seed),
        "missing": dict(absent),
    }


def _measured(variant: Variant, answers: Mapping[Variant, Answers]) -> bool:
    own = answers.get(variant)
    return own is not None and own.failure is None and bool(own.seconds)


def _reference(variant: Variant, answers: Mapping[Variant, Answers]) -> Variant | None:
    system = SAME.get(variant.system)
    if system is None and variant.system == "dense" and variant.precision == "float32":
        system = "transformers"
    if system is None:
        return None
    other = Variant(system, variant.precision, variant.threads)
    return other if _measured(other, answers) else None


def _ratios(
    pair: tuple[str, str, str, str],
    answers: Mapping[Variant, Answers],
    seed: int,
    *,
    decode: bool = False,
) -> list[dict[str, Any]]:
    system, precision, against, other = pair
    found = []
    for fast in answers:
        if fast.system != system or precision not in ("", fast.precision):
            continue
        slow = Variant(against, other or fast.precision, fast.threads)
        if _measured(fast, answers) and _measured(slow, answers):
            one, two = answers[fast], answers[slow]
            times = (two.seconds, one.seconds, two.own, one.own)
            if decode:
                times = (two.decode, one.decode, two.decode_own, one.decode_own)
            found.append(_ratio(fast, slow, *times, seed))
    return found


def _prefill_ratios(answers: Mapping[Variant, Answers], seed: int) -> list[dict[str, Any]]:
    found = []
    for fast, one in answers.items():
        if fast.system != "dense" or not one.prefill:
            continue
        for slow, two in answers.items():
            same = slow.precision in (fast.precision, "float32") and slow.threads == fast.threads
            if slow.system in ("transformers", "llama.cpp") and same and two.prefill:
                times = (two.prefill, one.prefill, two.prefill_own, one.prefill_own)
                found.append(_ratio(fast, slow, *times, seed))
    return found


def _ratio(
    fast: Variant,
    slow: Variant,
    slow_seconds: list[float],
    fast_seconds: list[float],
    slow_own: list[float],
    fast_own: list[float],
    seed: int,
) -> dict[str, Any]:
    made: dict[str, Any] = {"variant": fast.name, "against": slow.name}
    for name, two, one in (("wall", slow_seconds, fast_seconds), ("own", slow_own, fast_own)):
        estimate = bootstrap_ratio_of_medians(two, one, seed=seed)
        interval = estimate.interval
        ends = None if interval is None else [interval.low, interval.high]
        turns = [a / b for a, b in zip(two, one, strict=True)]
        made[name] = {
            "value": estimate.value,
            "interval": ends,
            "range": [min(turns), max(turns)],
        }
    return made


def show(figures: Mapping[str, Any], console: Console) -> None:
    """Prints both tables, and a line for each rival that is missing or failed."""
    table = Table(title="ms a token, prompt pass included; medians over prompts")
    table.add_column("variant", no_wrap=True)
    columns = ("ms/token", "own time", "decode alone", "own time", "prompt pass ms", "own time")
    for column in (*columns, "peak MB", "same tokens"):
        table.add_column(column, justify="right")
    for row in figures["variants"]:
        if "failure" in row:
            table.add_row(row["variant"], "failed")
            continue
        same = "-" if "same" not in row else f"{row['same']} of {row['prompts']}: {row['same_as']}"
        table.add_row(
            row["variant"],
            f"{row['ms_per_token']:.2f}",
            f"{row['own_ms_per_token']:.2f}",
            f"{row['decode_ms_per_token']:.2f}",
            f"{row['decode_own_ms_per_token']:.2f}",
            _number(row["prefill_ms"]),
            _number(row["prefill_own_ms"]),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            same,
        )
    console.print(table)
    titles = {"ratios": "ratios of medians", "decode_ratios": "the same without the prompt pass"}
    for key, title in (titles | {"prefill_ratios": "prompt pass alone"}).items():
        if figures[key]:
            ratios = Table(title=f"{title} [95 % interval]")
            for column in ("variant", "against", "faster by the wall clock", "by own time"):
                ratios.add_column(column)
            for ratio in figures[key]:
                ends = (_spread(ratio["wall"]), _spread(ratio["own"]))
                ratios.add_row(ratio["variant"], ratio["against"], *ends)
            console.print(ratios)
    failed = [
        f"{r['variant']} failed: {r['failure']}" for r in figures["variants"] if "failure" in r
    ]
    for line in [*figures["missing"].values(), *failed]:
        console.print(line, markup=False, soft_wrap=True)


_ROW_INCHES, _TITLE = 0.27, "Milliseconds a token, ours and others"


def picture(figures: Mapping[str, Any]) -> str:
    """Bars of ms a token of every variant, with the range over prompts, as SVG."""
    rows = [row for row in figures["variants"] if "failure" not in row]
    kinds = list(dict.fromkeys(_kind(row) for row in rows))

    def draw(axes: Axes) -> None:
        for at, row in enumerate(rows):
            value, (low, high) = row["ms_per_token"], row["ms_per_token_range"]
            axes.barh(at, value, height=0.7, color=mode_colour(_kind(row), kinds))
            axes.plot([low, high], [at, at], color="#1a1a1b", linewidth=1.0)
            axes.text(high, at, f" {value:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.margins(x=0.12)
        axes.set_xlabel("ms a token, prompt pass included: median and range over prompts")

    made = render(draw, "rivals", _TITLE, height=0.8 + _ROW_INCHES * len(rows))
    return made.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _kind(row: Mapping[str, Any]) -> str:
    """Whose a system is, as figures colour it: "exact lookup" is exact."""
    return str(row["system"]).split()[0]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _spread(estimate: Mapping[str, Any]) -> str:
    text = f"{estimate['value']:.2f}x"
    if estimate["interval"] is not None:
        text += " [{:.2f}, {:.2f}]".format(*estimate["interval"])
    return text
