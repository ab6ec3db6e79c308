"""Figures, tables and curves of `deliberate bench serve`."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deliberate.eval.benchmarks.serve_client import Outcome, Run
from deliberate.eval.benchmarks.serve_load import KINDS
from deliberate.eval.statistics import percentiles

Figures = dict[str, Any]
HEADINGS = (
    *("load", "requests", "offered /s", "answered /s", "good /s", "tokens /s", "refused", "failed"),
    *("first token P50/P90/P99 ms", "between tokens P50/P90/P99 ms", "whole P50/P90/P99 ms"),
    "within deadline",
)


def figures(run: Run, offered: float | None) -> Figures:
    """Of one load, JSON-ready: rates a second, percentiles in seconds, and per kind of request.

    Args:
        offered: requests a second that arrived; None for a closed loop.
    """
    every = run.outcomes
    answered = [one for one in every if one.answered]
    failed = [one for one in every if not one.answered and not one.refused]
    kinds = dict.fromkeys((*KINDS, *(one.kind for one in every)))
    return {
        "requests": len(every),
        "seconds": run.seconds,
        "offered_per_second": offered,
        "answered_per_second": len(answered) / run.seconds,
        "good_per_second": sum(one.good for one in every) / run.seconds,
        "tokens_per_second": sum(one.tokens for one in answered) / run.seconds,
        "answered": len(answered),
        "refused": sum(one.refused for one in every),
        "failed": len(failed),
        "errors": _reasons(failed),
        "refusals": _reasons([one for one in every if one.refused]),
        "largest_lag": max((one.lag for one in every), default=0.0),
        "layers_per_token": _mean_layers(answered),
        "within_deadline": _within(answered),
        **_times(answered),
        "kinds": {kind: _kind([one for one in every if one.kind == kind]) for kind in kinds},
    }


def _kind(every: Sequence[Outcome]) -> Figures:
    answered = [one for one in every if one.answered]
    return {"requests": len(every), "within_deadline": _within(answered), **_times(answered)}


def _times(answered: Sequence[Outcome]) -> Figures:
    """Seconds: to the first token, between a request's tokens (its mean), and to the end."""
    between = [
        (one.seconds - one.first) / (one.tokens - 1)
        for one in answered
        if one.first is not None and one.tokens > 1
    ]
    return {
        "first_token": spread([one.first for one in answered if one.first is not None]),
        "between_tokens": spread(between),
        "whole": spread([one.seconds for one in answered]),
        "longest_gap": max((max(one.gaps) for one in answered if one.gaps), default=None),
    }


def spread(sample: Sequence[float]) -> Figures | None:
    """P50, P90 and P99; None of an empty sample."""
    if not sample:
        return None
    found = percentiles(sample)
    return {"p50": found.median, "p90": found.p90, "p99": found.p99}


def _reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """The most frequent reasons, each with one example; those that differ in numbers are one."""
    examples: dict[str, list[str]] = {}
    for one in outcomes:
        text = str(one.error)
        examples.setdefault(re.sub(r"[\d.]+", "#", text), []).append(text)
    ranked = sorted(examples.values(), key=len, reverse=True)
    return [f"{len(own)} times, e.g. {own[0]}" for own in ranked[:3]]


def _mean_layers(answered: Sequence[Outcome]) -> float | None:
    counted = [(one.layers, one.tokens) for one in answered if one.layers is not None]
    tokens = sum(count for _, count in counted)
    return sum(layers * count for layers, count in counted) / tokens if tokens else None


def rows(loads: Mapping[str, Figures]) -> list[list[str]]:
    """Cells of the table under `HEADINGS`: a line for each load, and one for each kind in it."""
    made = []
    for name, own in loads.items():
        offered = own["offered_per_second"]
        made.append(
            [
                *(name, str(own["requests"]), "closed" if offered is None else f"{offered:.1f}"),
                *(f"{own[f'{what}_per_second']:.1f}" for what in ("answered", "good", "tokens")),
                *(str(own["refused"]), str(own["failed"]), *_cells(own)),
                _share(own),
            ]
        )
        for kind, part in own["kinds"].items():
            if part["requests"]:
                blank = [""] * 6
                made.append(
                    [f"  {kind}", str(part["requests"]), *blank, *_cells(part), _share(part)]
                )
    return made


def _within(answered: Sequence[Outcome]) -> float | None:
    """Share of the answers with a deadline that came in time; None without any."""
    dated = [one for one in answered if one.deadline_ms is not None]
    return sum(one.good for one in dated) / len(dated) if dated else None


def _share(part: Figures) -> str:
    within = part["within_deadline"]
    return "" if within is None else f"{100 * within:.1f} %"


def _cells(part: Figures) -> list[str]:
    return [_three(part[name]) for name in ("first_token", "between_tokens", "whole")]


def _three(spread: Figures | None) -> str:
    if spread is None:
        return ""
    return " / ".join(f"{1000 * spread[name]:.4g}" for name in ("p50", "p90", "p99"))


def show(loads: Mapping[str, Figures], console: Console) -> None:
    """Prints the table."""
    table = Table(*HEADINGS)
    for cells in rows(loads):
        table.add_row(*cells)
    console.print(table)
    for line in remarks(loads):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def remarks(loads: Mapping[str, Figures]) -> list[str]:
    """What a table does not show: failures, refusals, and a generator that fell behind."""
    made = []
    for name, own in loads.items():
        made += [f"{name}: failed: {text}" for text in own["errors"]]
        made += [f"{name}: refused: {text}" for text in own["refusals"]]
        if own["largest_lag"] > 0.05:
            made.append(
                f"{name}: the load fell behind by up to {1000 * own['largest_lag']:.0f} ms, which "
                "is part of the times"
            )
    return made


def goodput_line(loads: Mapping[str, Figures]) -> str | None:
    """Whether goodput falls once more comes than can be answered: that of the highest open rate
    against the most at any of them, and against a closed loop's; None of fewer than two rates."""
    rates = {name: own for name, own in loads.items() if name.startswith("poisson")}
    if len(rates) < 2:
        return None
    highest = max(rates, key=lambda name: float(rates[name]["offered_per_second"]))
    best = max(rates, key=lambda name: float(rates[name]["good_per_second"]))
    good, most = (float(rates[name]["good_per_second"]) for name in (highest, best))
    line = f"goodput at {highest}: {good:.1f} answers in time a second"
    if most:
        line += f", {100 * good / most:.1f} % of its most at any rate ({most:.1f} at {best})"
    for name, own in loads.items():
        if name.startswith("closed") and own["good_per_second"]:
            share = 100 * good / own["good_per_second"]
            line += f", {share:.1f} % of the {own['good_per_second']:.1f} of {name}"
    return line


def overhead_line(own: Figures) -> str:
    """What HTTP adds to the time to the first token of a request that is alone."""
    return (
        f"time to the first token of {own['requests']} requests, one at a time, P50/P90/P99 ms: "
        f"engine {_three(own['engine'])}, HTTP {_three(own['http'])}, "
        f"added {_three(own['added'])}; "
        f"of that the server {_three(own['server'])}, the client {_three(own['client'])}"
    )


def markdown(
    loads: Mapping[str, Figures],
    identity: Figures | None,
    overhead: Figures | None,
    line: str,
    command: str,
    lines: Sequence[str] = (),
) -> str:
    """The report as a page of Markdown."""
    parts = [f"# Load over HTTP\n\n`{command}`\n\n{line}\n"]
    if identity is not None:
        parts.append("## The same requests alone, in the engine, over HTTP\n")
        for fidelity, own in identity.items():
            parts.append(f"- {fidelity}: {identity_line(own)}")
        parts.append("")
    if overhead is not None:
        parts.append(f"## What HTTP adds\n\n{overhead_line(overhead)}\n")
    if loads:
        head = "| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS)
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in rows(loads))
        parts.append(f"## Loads\n\n{head}\n{body}\n")
        parts += [f"- {text}" for text in (*remarks(loads), *lines)]
        parts.append("\n![Rates and times against the load](serve.svg)\n")
    return "\n".join(parts)


def identity_line(own: Figures) -> str:
    """What came of comparing the answers of one fidelity."""
    return (
        f"{own['engine']} of {own['requests']} identical in the engine, {own['http']} of "
        f"{own['requests']} over HTTP, to those of generate alone"
    )


def curve(loads: Mapping[str, Figures]) -> str:
    """Rates and times to the first token against the offered load, as SVG."""
    points = [own for own in loads.values() if own["offered_per_second"] is not None]
    points.sort(key=lambda own: own["offered_per_second"])
    offered = [own["offered_per_second"] for own in points]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    for name, text in (("answered", "answered"), ("good", "within deadline")):
        left.plot(offered, [own[f"{name}_per_second"] for own in points], "o-", label=text)
    left.plot(offered, offered, ":", color="gray", label="offered")
    left.set(xlabel="offered, requests/s", ylabel="requests/s", ylim=(0, None))
    for name in ("p50", "p90", "p99"):
        times = [own["first_token"] for own in points]
        shown = [1000 * one[name] if one else float("nan") for one in times]
        right.plot(offered, shown, "o-", label=name.upper())
    right.set(xlabel="offered, requests/s", ylabel="time to the first token, ms", yscale="log")
    for axes in (left, right):
        axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
