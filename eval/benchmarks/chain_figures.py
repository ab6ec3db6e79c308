"""Pictures of `deliberate bench chains`: chains with their probes, and where each rule stopped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from deliberate.eval.benchmarks.chain_tables import RuleRow
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.report.figures import MODE_COLOURS, OTHER_COLOURS, PLOT_INCHES, legend, render
from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.recorded_chains import ChainSet, RecordedChain
from deliberate.utils.files import write_text

SHOWN = 8
_RIGHT, _WRONG = MODE_COLOURS["exact"], MODE_COLOURS["threshold"]
_MARKERS = ("v", "^", "s", "D", "P", "X", "*")


def probes_figure(
    chains: Sequence[RecordedChain], stops: Sequence[tuple[str, Sequence[int]]]
) -> str:
    """One line a chain: its probes, green where the answer is the whole chain's, and the stops."""

    def draw(axes: Axes) -> None:
        for row, chain in enumerate(chains):
            axes.plot([0, len(chain.tokens)], [row, row], color="#d0d0d1", linewidth=1.0, zorder=1)
            for same, colour in ((True, _RIGHT), (False, _WRONG)):
                places = [p.at for p in chain.probes if same_answer(p.answer, chain.answer) == same]
                axes.scatter(places, [row] * len(places), s=9, color=colour, zorder=2)
        for number, (name, stopped) in enumerate(stops):
            axes.scatter(
                list(stopped),
                [row - 0.28 for row in range(len(stopped))],
                s=26,
                marker=_MARKERS[number % len(_MARKERS)],
                color=OTHER_COLOURS[number % len(OTHER_COLOURS)],
                label=name,
                zorder=3,
            )
        axes.set_yticks(range(len(chains)), [f"{c.id.split('/')[-1][:12]}" for c in chains])
        axes.set_xlabel("tokens of reasoning; a dot is a probe, green: the whole chain's answer")
        axes.invert_yaxis()
        legend(axes)

    return render(draw, "probes", "Chains, probes and stops", height=0.42 * len(chains) + 1.2)


def rules_figure(rows: Sequence[RuleRow]) -> str:
    """Accuracy, or answers kept, against the mean seconds of a chain."""

    def draw(axes: Axes) -> None:
        for number, row in enumerate(rows):
            kept = 1.0 - row.changed if row.accuracy is None else row.accuracy
            colour = "#777777" if row.name.startswith("cut") else OTHER_COLOURS[number % 3]
            marker = "." if row.name.startswith("cut") else _MARKERS[number % len(_MARKERS)]
            axes.scatter([1e3 * row.seconds], [kept], color=colour, marker=marker, label=row.name)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("mean ms of a chain by the measured costs (tokens where none are)")
        axes.set_ylabel("right answers" if rows[0].accuracy is not None else "answers kept")
        legend(axes)

    return render(draw, "rules", "Rules for stopping", height=PLOT_INCHES * 1.2)


def curves_figure(calibration: ChainCalibration) -> str:
    """The calibrated probability by confidence, one curve a number of equal answers in a row."""

    def draw(axes: Axes) -> None:
        places = [i / 400 for i in range(401)]
        for streak in range(1, len(calibration.curves) + 1):
            found = [calibration.probability(place, streak) for place in places]
            more = " or more" if streak == len(calibration.curves) else ""
            axes.plot(places, found, label=f"{streak}{more} equal in a row")
        axes.set_xlabel("confidence of the probe's answer")
        axes.set_ylabel("P(the whole chain's answer)")
        legend(axes)

    return render(draw, "curves", "Calibrated probability", height=PLOT_INCHES)


def chains_page(
    folder: Path, chains: ChainSet, rows: Sequence[RuleRow], calibration: ChainCalibration
) -> Path:
    """Writes ``index.html`` with all pictures."""
    order = list(dict.fromkeys(chain.id for chain in chains.chains))
    tested = [chain for chain in chains.chains if chain.id in set(order[1::2])]
    stops = [
        (row.name, row.stops[:SHOWN])
        for row in rows
        if not row.name.startswith(("cut", "whole", "give_up"))
    ]
    figures = [
        probes_figure(tested[:SHOWN], stops),
        rules_figure(rows),
        curves_figure(calibration),
    ]
    title = html.escape(f"Chains of {chains.header.model or 'a file'}")
    body = "\n".join(f"<figure>{figure}</figure>" for figure in figures)
    path = folder / "index.html"
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n",
    )
    return path
