"""Figures of the report as inline SVG: text stays text, colours come from the page.

Each function returns one `<svg>` element without XML header, metadata, dates or references to
anything outside it; the same data give the same bytes. Colours are CSS variables with a
fallback, so one figure serves a light and a dark page. The mode colours are from the palette of
Okabe and Ito (2008), which readers with colour-vision deficiency can tell apart; every mode also
has its own marker.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deliberate.eval.report.numbers import number
from deliberate.eval.runner.summary import GroupRow, ModeSummary

MODE_COLOURS = {
    "transformers": "#777777",
    "dense": "#0072b2",
    "exact": "#009e73",
    "threshold": "#d55e00",
    "certified": "#cc79a7",
    "budget": "#8a6d00",
}
OTHER_COLOURS = ("#56b4e9", "#a6761d", "#6a51a3")
_MARKERS = {
    "transformers": "s",
    "dense": "o",
    "exact": "D",
    "threshold": "^",
    "certified": "P",
    "budget": "X",
}
_INK, _GRID = "#1a1a1b", "#d0d0d1"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
}
_WIDTH_INCHES, _ROW_INCHES, PLOT_INCHES = 5.2, 0.42, 3.3


def mode_colour(mode: str, modes: Sequence[str]) -> str:
    """Hex colour of a mode; modes without one of their own share `OTHER_COLOURS` in order."""
    if mode in MODE_COLOURS:
        return MODE_COLOURS[mode]
    others = [name for name in modes if name not in MODE_COLOURS]
    return OTHER_COLOURS[others.index(mode) % len(OTHER_COLOURS)]


def accuracy_figure(modes: Mapping[str, ModeSummary], prefix: str = "") -> str:
    """Accuracy of every mode with its Wilson 95 % interval."""

    def draw(axes: Axes) -> None:
        for row, (mode, summary) in enumerate(modes.items()):
            interval = summary.accuracy_interval
            _whisker(axes, mode, list(modes), row, interval.low, summary.accuracy, interval.high)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _label_rows(axes, list(modes), "accuracy, 95 % interval")

    return render(draw, f"{prefix}accuracy", "Accuracy by mode", height=_rows_height(len(modes)))


def latency_figure(modes: Mapping[str, ModeSummary], prefix: str = "") -> str:
    """Milliseconds per token, prompt pass included: median (marker), P90 (tick), P99 (end)."""

    def draw(axes: Axes) -> None:
        for row, (mode, summary) in enumerate(modes.items()):
            spread, colour = summary.shown_ms_per_token, mode_colour(mode, list(modes))
            axes.plot([spread.median, spread.p99], [row, row], color=colour, linewidth=1.4)
            axes.plot([spread.p90], [row], marker="|", markersize=11, color=colour)
            axes.plot([spread.p99], [row], marker="|", markersize=6, color=colour)
            axes.plot([spread.median], [row], marker=_marker(mode), markersize=7, color=colour)
            _value(axes, spread.median, row, number(spread.median))
        axes.set_xlim(left=0)
        _label_rows(axes, list(modes), "ms per token, prompt pass included: median, P90, P99")

    title = "Milliseconds per token by mode"
    return render(draw, f"{prefix}latency", title, height=_rows_height(len(modes)))


def tradeoff_figure(modes: Mapping[str, ModeSummary], prefix: str = "") -> str:
    """Accuracy with its Wilson 95 % interval against median milliseconds per token,
    prompt pass included."""

    def draw(axes: Axes) -> None:
        for mode, summary in modes.items():
            x, interval = summary.shown_ms_per_token.median, summary.accuracy_interval
            colour = mode_colour(mode, list(modes))
            axes.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.6)
            axes.plot(
                [x], [summary.accuracy], marker=_marker(mode), markersize=7, linewidth=1.6,
                color=colour, label=mode,
            )  # fmt: skip
        axes.set_xlim(0, 1.12 * max(s.shown_ms_per_token.median for s in modes.values()))
        axes.margins(y=0.1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("ms per token, prompt pass included, median")
        axes.set_ylabel("accuracy, 95 % interval")
        axes.grid(axis="y", linewidth=0.6)
        legend(axes)

    return render(draw, f"{prefix}tradeoff", "Accuracy against time", height=PLOT_INCHES)


def exit_figure(modes: Mapping[str, ModeSummary], num_layers: int, prefix: str = "") -> str | None:
    """Share of tokens by the layer that chose them; None if no token of any mode exits early."""
    shown = {m: s for m, s in modes.items() if any(x < num_layers for x in s.exit_histogram)}
    if not shown:
        return None
    layers = sorted({layer for s in shown.values() for layer in s.exit_histogram} | {num_layers})

    def draw(axes: Axes) -> None:
        width = 0.8 / len(shown)
        for index, (mode, summary) in enumerate(shown.items()):
            total = sum(summary.exit_histogram.values())
            shares = [summary.exit_histogram.get(layer, 0) / total for layer in layers]
            centres = [i - 0.4 + width * (index + 0.5) for i in range(len(layers))]
            colour = mode_colour(mode, list(modes))
            axes.bar(centres, shares, width=width * 0.92, color=colour, label=mode)
            for centre, share in zip(centres, shares, strict=True):
                text = f"{100 * share:.0f}" if share >= 0.005 or share == 0 else "<1"
                axes.text(centre, share, text, ha="center", va="bottom", fontsize=8.5)
        names = [f"{x}\n(full)" if x == num_layers else str(x) for x in layers]
        axes.set_xticks(range(len(layers)), names)
        axes.set_xlabel("layer at which the token was chosen")
        axes.set_ylabel("% of tokens")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.grid(axis="y", linewidth=0.6)
        axes.margins(y=0.14)
        legend(axes)

    return render(draw, f"{prefix}exits", "Exit histogram", height=PLOT_INCHES)


def accuracy_by_difficulty_figure(modes: Mapping[str, ModeSummary], prefix: str = "") -> str | None:
    """Accuracy against difficulty with Wilson 95 % intervals; None below two difficulties."""

    def draw(axes: Axes) -> None:
        labels = _distinct(modes)
        names = [mode for mode in labels if modes[mode].by_difficulty]
        for index, mode in enumerate(names):
            rows = modes[mode].by_difficulty
            # Side by side, else the intervals of modes that agree hide each other.
            shift = 0.14 * (index - (len(names) - 1) / 2)
            x = [int(row.group) + shift for row in rows]
            y = [row.correct / row.total for row in rows]
            ends = [
                [max(0.0, value - row.interval.low) for value, row in zip(y, rows, strict=True)],
                [max(0.0, row.interval.high - value) for value, row in zip(y, rows, strict=True)],
            ]
            colour = mode_colour(mode, list(modes))
            axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.55)
            axes.errorbar(
                x, y, yerr=ends, fmt=_marker(mode), markersize=4.5, color=colour,
                elinewidth=1.1, label=labels[mode],
            )  # fmt: skip
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _difficulty_axis(axes, "accuracy, 95 % interval")

    return _by_difficulty(modes, draw, f"{prefix}by-difficulty", "Accuracy against difficulty")


def depth_by_difficulty_figure(
    modes: Mapping[str, ModeSummary], num_layers: int, prefix: str = ""
) -> str | None:
    """Mean exit layer (dashed) and layers run per token (solid) against difficulty."""

    def draw(axes: Axes) -> None:
        for mode, summary in modes.items():
            early = any(layer < num_layers for layer in summary.exit_histogram)
            colour = mode_colour(mode, list(modes))
            style: dict[str, Any] = {"color": colour, "marker": _marker(mode), "markersize": 4.5}
            ran = _series(summary.by_difficulty, lambda row: row.layers_per_token)
            left = _series(summary.by_difficulty, lambda row: row.mean_exit_layer)
            if ran[0]:
                axes.plot(*ran, linewidth=1.4, label=f"{mode}: layers run per token", **style)
            if left[0] and early:
                axes.plot(
                    *left, linewidth=1.1, linestyle=(0, (4, 2)), markerfacecolor="none",
                    label=f"{mode}: mean exit layer", **style,
                )  # fmt: skip
        axes.set_ylim(bottom=0)
        _difficulty_axis(axes, "layers")

    return _by_difficulty(modes, draw, f"{prefix}depth", "Depth against difficulty")


def rounds_by_difficulty_figure(modes: Mapping[str, ModeSummary], prefix: str = "") -> str | None:
    """Rounds of the gate per 100 tokens against difficulty; None below two, or without a gate."""
    shown = {m: s.rounds.by_difficulty for m, s in modes.items() if s.rounds is not None}
    if max((len(levels) for levels in shown.values()), default=0) < 2:
        return None

    def draw(axes: Axes) -> None:
        for mode, levels in shown.items():
            axes.plot(
                [int(level) for level in levels], [100 * each for each in levels.values()],
                color=mode_colour(mode, list(modes)), marker=_marker(mode), markersize=4.5,
                linewidth=1.4, label=mode,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        _difficulty_axis(axes, "rounds per 100 tokens")

    return render(draw, f"{prefix}rounds", "Rounds against difficulty", height=PLOT_INCHES)


def _distinct(modes: Mapping[str, ModeSummary]) -> dict[str, str]:
    """Modes and labels; modes with dense's tokens on all of dense's problems join its label."""
    dense = modes.get("dense")
    same = [
        mode
        for mode, summary in modes.items()
        if dense
        and (versus := summary.versus_dense)
        and versus.identical == versus.problems == summary.total == dense.total
    ]
    return {
        mode: " = ".join([mode, *same]) if mode == "dense" else mode
        for mode in modes
        if mode not in same
    }


def _series(
    rows: Sequence[GroupRow], value: Callable[[GroupRow], float | None]
) -> tuple[list[int], list[float]]:
    points = [(int(row.group), found) for row in rows if (found := value(row)) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _by_difficulty(
    modes: Mapping[str, ModeSummary], draw: Callable[[Axes], None], name: str, title: str
) -> str | None:
    if max((len(summary.by_difficulty) for summary in modes.values()), default=0) < 2:
        return None
    return render(draw, name, title, height=PLOT_INCHES)


def _whisker(
    axes: Axes, mode: str, modes: Sequence[str], row: int, low: float, value: float, high: float
) -> None:
    colour = mode_colour(mode, modes)
    axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot([low, high], [row, row], linestyle="", marker="|", markersize=8, color=colour)
    axes.plot([value], [row], marker=_marker(mode), markersize=7, color=colour)
    _value(axes, value, row, f"{100 * value:.1f}")


def _value(axes: Axes, x: float, row: int, text: str) -> None:
    axes.annotate(
        text, (x, row), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8.5
    )


def _label_rows(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_xlabel(label)
    axes.grid(axis="x", linewidth=0.6)


def _difficulty_axis(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("difficulty")
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.6)
    legend(axes)


def legend(axes: Axes) -> None:
    """A legend above the plot."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderaxespad=0.2,
        fontsize=8.5, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip


def _marker(mode: str) -> str:
    return _MARKERS.get(mode, "v")


def _rows_height(rows: int) -> float:
    return 0.75 + _ROW_INCHES * rows


def render(draw: Callable[[Axes], None], name: str, title: str, height: float) -> str:
    """One figure as an `<svg>` element.

    Args:
        name: unique within the page; ids begin with it.
        height: inches.
    """
    # The salt makes ids of shapes reproducible and, since every figure has its own, unique
    # within the page.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    """Turn a stand-alone SVG file into an element of an HTML page."""
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    box = re.search(r'viewBox="([^"]*)"', body)
    # A fresh opening tag: namespaces are addresses, and HTML needs none.
    opening = (
        f'<svg class="figure" role="img" aria-label="{title}" viewBox="{box[1] if box else ""}">'
    )
    body = opening + body[body.index(">") + 1 :]
    ids = sorted(set(re.findall(r'\bid="([^"]+)"', body)), key=len, reverse=True)
    for old in ids:  # matplotlib numbers groups alike in every figure
        new = f"{name}-{old}"
        body = body.replace(f'id="{old}"', f'id="{new}"')
        body = body.replace(f'"#{old}"', f'"#{new}"').replace(f"url(#{old})", f"url(#{new})")
    variables = {_INK: "ink", _GRID: "rule"}
    variables |= {colour: f"mode-{mode}" for mode, colour in MODE_COLOURS.items()}
    for colour, variable in variables.items():
        body = body.replace(colour, f"var(--{variable}, {colour})")
    return re.sub(r"font(-family)?: ?([^;\"]*?)'?(DejaVu Sans|sans-serif)[^;\"]*", _font, body)


def _font(match: re.Match[str]) -> str:
    return f"font{match[1] or ''}: {match[2]}system-ui, sans-serif"
