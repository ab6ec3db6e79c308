"""The report of an evaluation of reasoning: a table, what it means, and some chains."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from deliberate.eval.reasoning.figures import Row, Summary
from deliberate.eval.report import numbers
from deliberate.eval.report.figures import MODE_COLOURS, OTHER_COLOURS, legend, render
from deliberate.eval.statistics import Estimate, PairedAccuracy

SHOWN = 8
_RIGHT, _WRONG = MODE_COLOURS["exact"], MODE_COLOURS["threshold"]
COLUMNS = (
    *("variant", "accuracy", "chains", "reasoning tokens", "probes' share", "ms"),
    *("tokens to baseline", "time to baseline", "accuracy to baseline", "to its control"),
)


def cells(summary: Summary) -> tuple[str, ...]:
    """The row of a variant in the table."""
    share, interval = summary.accuracy
    return (
        summary.name,
        f"{numbers.percent(share)} {numbers.percent_interval(interval)}",
        f"{summary.chains:.2f}",
        f"{summary.reasoning_tokens:.1f}",
        numbers.percent(summary.probe_share),
        f"{1000 * summary.seconds:.1f}",
        _ratio(summary.token_ratio),
        _ratio(summary.time_ratio),
        _paired(summary.against_baseline),
        "" if summary.against_control is None else _paired(summary.against_control),
    )


def _ratio(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} {numbers.ratio_interval(estimate.interval)}".strip()


def _paired(found: PairedAccuracy) -> str:
    points = numbers.signed_points(found.difference)
    interval = numbers.points_interval(found.interval)
    return f"{points} {interval}, {numbers.p_value(found.mcnemar.p)}"


def show(summaries: Sequence[Summary], console: Console) -> None:
    """Prints the table, and in red where tokens are saved and no time is."""
    table = Table(show_lines=True)
    for name in COLUMNS:
        table.add_column(name)
    for summary in summaries:
        table.add_row(*cells(summary))
    console.print(table)
    for summary in summaries:
        if summary.warning is not None:
            console.print(summary.warning, style="bold red", markup=False, soft_wrap=True)


def probes_figure(name: str, rows: Sequence[Row], whole: Sequence[Row], number: int) -> str:
    """One line a chain: the whole chain in grey, the probes of the variant, and its stop."""

    def draw(axes: Axes) -> None:
        for place, (row, full) in enumerate(zip(rows, whole, strict=True)):
            axes.plot([0, full.length], [place, place], color="#d0d0d1", linewidth=1.0, zorder=1)
            for right, colour in ((True, _RIGHT), (False, _WRONG)):
                at = [probe.at for probe in row.probes if probe.right is right]
                axes.scatter(at, [place] * len(at), s=9, color=colour, zorder=2)
        stops = [row.length for row in rows]
        axes.scatter(
            stops,
            [place - 0.28 for place in range(len(rows))],
            s=26,
            marker="v",
            color=OTHER_COLOURS[number % len(OTHER_COLOURS)],
            label=f"{name} ends",
            zorder=3,
        )
        axes.set_yticks(range(len(rows)), [row.problem.split("/")[-1][:12] for row in rows])
        axes.set_xlabel("tokens of reasoning; a dot is a probe, green: its answer is right")
        axes.invert_yaxis()
        legend(axes)

    return render(draw, f"probes-{number}", name, height=0.42 * len(rows) + 1.2)


def page(title: str, summaries: Sequence[Summary], facts: Sequence[str]) -> str:
    """The report as one self-contained page of HTML."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(one)) + "</tr>"
        for one in summaries
    )
    warnings = "".join(
        f'<p class="warning">{html.escape(one.warning)}</p>' for one in summaries if one.warning
    )
    whole = summaries[0].rows[:SHOWN]
    pictures = "".join(
        probes_figure(one.name, one.rows[:SHOWN], whole, number) + _chains(one)
        for number, one in enumerate(summaries)
        if any(row.probes for row in one.rows[:SHOWN])
    )
    notes = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    return _PAGE.format(
        title=html.escape(title), head=head, body=body, warnings=warnings, pictures=pictures,
        notes=notes,
    )  # fmt: skip


def _chains(summary: Summary) -> str:
    items = []
    for row in summary.rows[:SHOWN]:
        probes = ", ".join(f"{one.at}: {one.answer or 'none'}" for one in row.probes)
        end = row.stopped or "ended by itself"
        verdict = "right" if row.right else "wrong"
        text = (
            f"{row.problem}: probes {probes or 'none'}; {end} after {row.length} tokens; "
            f"answer {row.answer or 'none'}, {verdict}"
        )
        items.append(f"<li>{html.escape(text)}</li>")
    return f"<ul>{''.join(items)}</ul>"


def record(summaries: Sequence[Summary], facts: dict[str, Any]) -> dict[str, Any]:
    """What is saved beside the page."""
    return facts | {"variants": [one.record() for one in summaries]}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3rem .5rem; text-align: left }}
.warning {{ color: #b00020; font-weight: 600 }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>{title}</h1>{warnings}
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p>Accuracies are compared on the same problems (Newcombe's interval, exact McNemar test); the first
variant is the baseline. A control spends the mean compute of its variant without deciding: every
chain is cut at one length, or so many chains are sampled for every problem.</p>
{pictures}{notes}
</body></html>
"""
