"""`deliberate bench agreement` for reading: tables in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from deliberate.eval.statistics import Estimate

if TYPE_CHECKING:
    from deliberate.eval.benchmarks.agreement_result import Measured


def show(
    results: Sequence[Measured],
    timings: Mapping[str, Any],
    change: Estimate | None,
    *,
    target: float,
    console: Console,
) -> None:
    """Prints every model's exits, what was reached, and the times.

    Args:
        timings: `deliberate.eval.benchmarks.decode.report` by label.
        change: of the held-out loss, model against baseline.
    """
    if not console.is_terminal:
        console.width = 120
    for one in results:
        _show_exits(one, target, console)
        _show_times(one, timings[one.label], console)
    if change is not None:
        console.print(
            f"the model's last layer loses {_interval(change, '{:+.4f}')} nats/token over the "
            "baseline's on the held-out texts",
            soft_wrap=True,
        )


def _show_exits(one: Measured, target: float, console: Console) -> None:
    figures = one.figures
    table = Table(
        title=f"{one.label}: {one.name} ({one.num_layers} layers, {one.executor}), "
        f"{figures.tokens} tokens of {figures.sequences} continuations",
        title_justify="left",
    )
    for head in (
        "exit",
        "agrees with the last",
        "threshold",
        "exit here",
        "agree of those",
        "nats/token",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    losses = [None] * len(figures.exits) if one.loss is None else list(one.loss.exits)
    for row, loss in zip(figures.exits, losses, strict=True):
        table.add_row(
            str(row.layer),
            _percent(row.agreement),
            "never" if math.isinf(row.threshold) else f"{row.threshold:.4f}",
            f"{row.leaving:.1%}",
            "-" if row.kept is None else _percent(row.kept),
            "-" if loss is None else _interval(loss, "{:.3f}"),
        )
    if one.loss is not None:
        top = _interval(one.loss.top, "{:.3f}")
        table.add_row(f"last, {one.num_layers}", "", "", "", "", top)
    console.print(table)
    console.print(
        f"thresholds for {target:.1%}, chosen on the other half: {_percent(figures.reached)} of "
        f"these tokens agree, and exit after {figures.layers_per_token:.2f} of {one.num_layers} "
        "layers on average",
        soft_wrap=True,
    )
    for reason in one.dropped:
        console.print(reason, soft_wrap=True)
    if one.dropped:
        used = [
            str(row.layer)
            for row, least in zip(figures.exits, one.requested, strict=True)
            if not math.isinf(least)
        ]
        console.print(
            f"exits evaluated when decoding: {', '.join(used) or 'none'}; then "
            f"{_percent(one.decoding.reached)} agree, {one.decoding.layers_per_token:.2f} layers",
            soft_wrap=True,
        )
    for mode, found in one.free.items():
        console.print(
            f"{mode}: {_percent(found)} of its own tokens are the full depth's choice after the "
            "same text",
            soft_wrap=True,
        )


def _show_times(one: Measured, figures: Mapping[str, Any], console: Console) -> None:
    table = Table(
        title=f"{one.label}: ms per token, prompt pass included; speed with 95 % intervals",
        title_justify="left",
    )
    heads = ("median", "P90", "layers/token", "as dense", "against dense", "against transformers")
    for head in ("mode", *heads):
        table.add_column(head, justify="left" if head == "mode" else "right", no_wrap=True)
    ratios: dict[tuple[str, str], str] = {}
    for ratio in figures["ratios"]:
        text = f"{ratio['speedup']:.2f}x"
        if ratio["interval"] is not None:
            text += " [{:.2f}, {:.2f}]".format(*ratio["interval"])
        ratios[ratio["variant"], ratio["against"]] = text
    for name, row in figures["variants"].items():
        times, layers = row["ms_per_token"], row["layers_per_token"]
        table.add_row(
            name,
            f"{times['median']:.3f}",
            f"{times['p90']:.3f}",
            "-" if layers is None else f"{layers:.2f}",
            f"{row['identical_to_dense']} of {row['sequences']}",
            ratios.get((name, "dense"), "-"),
            ratios.get((name, "transformers generate"), "-"),
        )
    console.print(table)


def _percent(estimate: Estimate) -> str:
    text = f"{100 * estimate.value:.1f} %"
    if estimate.interval is None:
        return text
    return f"{text} [{100 * estimate.interval.low:.1f}, {100 * estimate.interval.high:.1f}]"


def _interval(estimate: Estimate, form: str) -> str:
    text = form.format(estimate.value)
    if estimate.interval is None:
        return text
    low, high = form.format(estimate.interval.low), form.format(estimate.interval.high)
    return f"{text} [{low}, {high}]"
