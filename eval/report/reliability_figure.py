"""Reliability diagram on doubt: claimed against observed rate of disagreement, log scales.

Agreement of a good exit is above 99 %, where an ordinary diagram shows one point in a corner.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deliberate.calibration.reliability import Reliability
from deliberate.utils.files import write_text

_INK, _GRID, _EXACT, _BINS = "#1a1a1b", "#d0d0d1", "#777777", "#0072b2"
_PANEL_INCHES = 2.7
_PIXELS_PER_INCH = 150


def reliability_figure(names: Sequence[str], found: Sequence[Reliability]) -> Figure:
    """One panel per exit: bins with Wilson 95 % intervals about the line of exact claims.

    A bin without a disagreement has no point on a log scale: only its interval is drawn, open
    below.
    """
    figure = Figure(figsize=(0.4 + _PANEL_INCHES * len(names), 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    doubts = [1 - b.probability for each in found for b in each.bins]
    ends = [1 - b.interval()[0] for each in found for b in each.bins]
    low = 0.5 * min(doubts)
    high = min(1.0, 1.5 * max(*doubts, *ends))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for index, (name, each, axes) in enumerate(zip(names, found, panels, strict=True)):
        _draw(axes, each, low, high)
        axes.set_title(f"{name}\ncalibration error {100 * each.ece:.2f} %", fontsize=9)
        axes.set_xlabel("claimed disagreement")
        if index == 0:
            axes.set_ylabel("observed disagreement")
    return figure


def write_reliability(
    folder: Path, names: Sequence[str], found: Sequence[Reliability]
) -> tuple[Path, Path]:
    """Writes `reliability.svg` and `reliability.png`; the same data give the same SVG."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "reliability",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    vector, raster = folder / "reliability.svg", folder / "reliability.png"
    with matplotlib.rc_context(style):
        figure = reliability_figure(names, found)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
        write_text(vector, text.getvalue())
        figure.savefig(raster, format="png", dpi=_PIXELS_PER_INCH)
    return vector, raster


def _draw(axes: Axes, each: Reliability, low: float, high: float) -> None:
    axes.plot([low, high], [low, high], color=_EXACT, linewidth=1.0, linestyle=(0, (4, 2)))
    for b in each.bins:
        doubt, observed = 1 - b.probability, 1 - b.rate
        least, most = b.interval()
        axes.plot([doubt] * 2, [max(low / 10, 1 - most), 1 - least], color=_BINS, linewidth=1.2)
        if observed > 0:
            axes.plot([doubt], [observed], marker="o", markersize=4.5, color=_BINS)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.grid(linewidth=0.6, color=_GRID)
    axes.set_axisbelow(True)
