"""The table and the picture of `deliberate bench rate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from deliberate.eval.benchmarks.harness import table_console
from deliberate.eval.report.figures import PLOT_INCHES, legend, render
from deliberate.eval.statistics import PairedAccuracy

ONE, WIDTH = "one rate", 110


@dataclass(frozen=True)
class RateRow:
    """One variant at one budget, each problem by what the other half chose.

    Attributes:
        budget: mean seconds allowed.
        right: share of right answers; what is left unanswered is not right.
        seconds, chains, tokens: means.
        versus: one rate's accuracy minus this one's, paired; None for one rate itself.
    """

    name: str
    budget: float
    setting: str
    right: float
    seconds: float
    chains: float
    tokens: float
    versus: PairedAccuracy | None


def show(rows: Sequence[RateRow]) -> None:
    """The table, a block a budget."""
    table = Table(title="right answers at the same mean seconds a problem, on fresh problems")
    for name in ("budget", "variant", "right", "took", "chains", "tokens", "one rate against it"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    shown = 0.0
    for row in rows:
        against = ""
        if row.versus is not None:
            low, high = row.versus.interval.low, row.versus.interval.high
            against = f"{100 * row.versus.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        table.add_row(
            f"{row.budget:.3g} s" if shown != row.budget else "",
            f"{row.name} ({row.setting})",
            f"{row.right:.1%}",
            f"{row.seconds:.3g}",
            f"{row.chains:.1f}",
            f"{row.tokens:.0f}",
            against,
        )
        shown = row.budget
    table_console(WIDTH).print(table)


def rate_figure(rows: Sequence[RateRow]) -> str:
    """Right answers against mean seconds, one line a variant."""

    def draw(axes: Axes) -> None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(row.name, []).append((row.seconds, row.right))
        for name, points in lines.items():
            width = 2.0 if name == ONE else 1.0
            seconds, right = zip(*points, strict=True)
            axes.plot(seconds, right, marker="o", linewidth=width, label=name)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("mean seconds a problem by the measured costs, probes included")
        axes.set_ylabel("right answers")
        legend(axes)

    return render(draw, "rate", "One rate against each level alone", height=PLOT_INCHES * 1.2)
