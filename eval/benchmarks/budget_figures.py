"""Figures of the budget sweep: accuracy against time, and a machine that becomes slower."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from deliberate.eval.benchmarks.budget_points import BudgetRow, Point
from deliberate.eval.benchmarks.budget_step import StepChange
from deliberate.eval.report.figures import MODE_COLOURS, OTHER_COLOURS, PLOT_INCHES, legend, render

_NAMES = {"fixed": "fixed depth", "random": "random exits"}
_STYLES = {
    "fixed": (OTHER_COLOURS[0], "v"),
    "random": ("#777777", "."),
    "dense": (MODE_COLOURS["dense"], "o"),
    "exact": (MODE_COLOURS["exact"], "D"),
}


def curve_figure(rows: Sequence[BudgetRow], points: Sequence[Point], prefix: str = "") -> str:
    """Accuracy with Wilson's 95 % interval against mean milliseconds per token."""

    def draw(axes: Axes) -> None:
        for kind, (colour, marker) in _STYLES.items():
            found = sorted((p for p in points if p.kind == kind), key=lambda p: p.ms_per_token)
            if not found:
                continue
            line = 0.8 if kind == "random" else 0.0
            _curve(axes, found, colour, marker, _NAMES.get(kind, kind), line)
        held = sorted((row.point for row in rows), key=lambda p: p.ms_per_token)
        _curve(axes, held, MODE_COLOURS["budget"], "X", "budget", 1.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        times = [p.ms_per_token for p in (*points, *held)]
        low, high = min(times), max(times)
        axes.set_xlim(low / 1.08, high * 1.08)
        axes.set_xticks([low * (high / low) ** (i / 4) for i in range(5)])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2f}")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("ms per token, mean over requests, prompt pass included")
        axes.set_ylabel("accuracy, 95 % interval")
        axes.grid(axis="y", linewidth=0.6)
        legend(axes)

    return render(draw, f"{prefix}curve", "Accuracy against time", height=PLOT_INCHES * 1.15)


def step_figure(step: StepChange, prefix: str = "") -> str:
    """Windowed mean of milliseconds per token along the stream, with the budget."""

    def draw(axes: Axes) -> None:
        times = [1e3 * token.seconds for token in step.tokens]
        width = step.window
        means = [sum(times[i - width : i]) / width for i in range(width, len(times) + 1)]
        places = [i - step.before for i in range(width, len(times) + 1)]
        axes.plot(places, means, color=MODE_COLOURS["budget"], linewidth=1.4, label="measured")
        dense = MODE_COLOURS["dense"]
        axes.axhline(step.budget_ms, color=dense, linewidth=1.1, label="budget")
        axes.axvline(0, color="#777777", linewidth=1.0, linestyle=(0, (4, 2)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"tokens since the machine became {step.factor:g} times slower")
        axes.set_ylabel(f"ms per token, mean of the last {width}")
        axes.grid(axis="y", linewidth=0.6)
        legend(axes)

    return render(draw, f"{prefix}step", "A machine that becomes slower", height=PLOT_INCHES)


def standalone(svg: str) -> str:
    """A figure of a page as a file of its own."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _curve(
    axes: Axes, points: Sequence[Point], colour: str, marker: str, label: str, line: float
) -> None:
    x, y = [p.ms_per_token for p in points], [p.accuracy for p in points]
    ends = [
        [max(0.0, p.accuracy - p.interval.low) for p in points],
        [max(0.0, p.interval.high - p.accuracy) for p in points],
    ]
    if line:
        axes.plot(x, y, color=colour, linewidth=line)
    axes.errorbar(
        x, y, yerr=ends, fmt=marker, markersize=6, color=colour, elinewidth=1.0, label=label
    )
