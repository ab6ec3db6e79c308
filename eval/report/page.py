"""One self-contained HTML page per run, or per comparison of runs.

The opening statement is generated from the figures: what cannot be told apart from chance is
called so, an exact mode that is not identical is called broken, and tokens that are faster in
answers that are longer are not called a speedup.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from deliberate.eval.report import figures, numbers
from deliberate.eval.report.depth_colours import depth_colours
from deliberate.eval.report.guarantee_text import budget_facts, certified_facts
from deliberate.eval.runner.deliberation_rounds import RoundsSummary
from deliberate.eval.runner.outcomes import ModeOutcome, ProblemRecord, first_difference
from deliberate.eval.runner.results import EvaluationResult
from deliberate.eval.runner.summary import AnswerSummary, Comparison, ModeSummary
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

REPORT_FILE = "report.html"
BASELINES = ("transformers", "dense")
Run = tuple[EvaluationResult, Sequence[ProblemRecord]]


@dataclass(frozen=True)
class Cell:
    """A table cell: the figure, its uncertainty or unit below, and whether it needs attention."""

    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Token:
    """One generated token as it is shown."""

    text: str
    layer: int
    tooltip: str
    diverges: bool
    rounds: int = 0


def render_report(results: Sequence[Run], *, title: str | None = None) -> str:
    """The page as text. Several results are compared first, then shown one after the other.

    Raises:
        DeliberateError: no results are given.
    """
    if not results:
        raise DeliberateError("a report needs at least one result folder")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("deliberate.eval.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    names = [result.name for result, _ in results]
    layers = {layer for r, _ in results for s in r.modes.values() for layer in s.exit_histogram} | {
        result.model["num_layers"] for result, _ in results
    }
    return template.render(
        title=title or (names[0] if len(names) == 1 else "Comparison: " + ", ".join(names)),
        runs=[_run_view(i, result, records) for i, (result, records) in enumerate(results)],
        comparison=_comparison_rows(results) if len(results) > 1 else [],
        differences=differences(results),
        mode_colours=figures.MODE_COLOURS,
        depth_colours=depth_colours(sorted(layers)),
    )


def write_report(
    folder_out: str | Path,
    results: Sequence[Run],
    *,
    title: str | None = None,
    name: str = REPORT_FILE,
) -> Path:
    """Write `report.html` into `folder_out`, whole or not at all; returns its path."""
    text = render_report(results, title=title)
    path = Path(folder_out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def differences(results: Sequence[Run]) -> list[str]:
    """What keeps the runs from being comparable: other problems, data, weights or machine."""
    if len(results) < 2:
        return []
    facts: list[dict[str, Any]] = []
    for result, records in results:
        ids = "\n".join(sorted(record.id for record in records))
        facts.append(
            {
                "task": f"{result.task['name']} {result.task['split']}",
                "data hash": result.task["data_sha256"],
                "set of problems": f"{len(records)} problems, ids "
                + hashlib.sha256(ids.encode()).hexdigest()[:12],
                "model hash": result.model["sha256"],
                **{f"environment {k}": v for k, v in result.environment.items()},
            }
        )
    found = []
    for key in dict.fromkeys(k for fact in facts for k in fact):
        values = [numbers.plain(fact.get(key)) for fact in facts]
        if len(set(values)) > 1:
            shown = [v[:12] if key.endswith("hash") else v for v in values]
            pairs = zip((r.name for r, _ in results), shown, strict=True)
            found.append(f"{key}: " + "; ".join(f"{name} has {value}" for name, value in pairs))
    return found


def choose_samples(records: Sequence[ProblemRecord], modes: Sequence[str]) -> list[ProblemRecord]:
    """Three to six problems, chosen by rule and not by look.

    The first problem in run order of up to five difficulties spread over the range; if none of
    these was answered wrongly, the first that was, preferring one that dense answered rightly.
    """
    pool = [record for record in records if all(mode in record.modes for mode in modes)]
    levels = sorted({r.difficulty for r in pool if r.difficulty is not None})
    chosen = [next(r for r in pool if r.difficulty == level) for level in _spread(levels, 5)]
    for record in _spread(pool, 5):
        if len(chosen) < min(3, len(pool)) and record not in chosen:
            chosen.append(record)

    def wrong(record: ProblemRecord) -> bool:
        return any(not record.modes[mode].correct for mode in modes)

    if not any(map(wrong, chosen)):
        failures = [r for r in pool if wrong(r)]
        lost = [r for r in failures if "dense" in r.modes and r.modes["dense"].correct]
        chosen += (lost or failures)[:1]
    order = {id(record): index for index, record in enumerate(pool)}
    return sorted(chosen, key=lambda r: (r.difficulty or 0, order[id(r)]))


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` items, evenly spaced, first and last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _run_view(index: int, result: EvaluationResult, records: Sequence[ProblemRecord]) -> Any:
    modes, depth, prefix = result.modes, result.model["num_layers"], f"run{index}-"
    shown = [m for m, s in modes.items() if m not in BASELINES and s.exit_histogram]
    shown = shown or [m for m in modes if modes[m].exit_histogram][:1]
    return {
        "prefix": prefix,
        "result": result,
        "lead": numbers.lead(result),
        "statements": numbers.statements(result),
        "table": [(mode, _main_row(mode, summary)) for mode, summary in modes.items()],
        "details": [(mode, _detail_row(summary)) for mode, summary in modes.items()],
        "answers": [(m, _answers_row(s.answers)) for m, s in modes.items() if s.answers],
        "guarantees": [
            (mode, facts)
            for mode, facts in (
                ("certified", certified_facts(result)),
                ("budget", budget_facts(result)),
            )
            if facts
        ],
        "figures": [
            (caption, svg)
            for caption, svg in (
                (
                    "Accuracy. Lines are Wilson 95 % intervals. Modes answer the same problems, "
                    "so overlapping lines do not settle whether two differ: the paired test does.",
                    figures.accuracy_figure(modes, prefix),
                ),
                (
                    "Time per token, prompt pass included. Marker: median over problems; ticks: "
                    "P90 and P99.",
                    figures.latency_figure(modes, prefix),
                ),
                (
                    "What speed costs: time per token (median, prompt pass included) and accuracy. "
                    "Better is up and to the left.",
                    figures.tradeoff_figure(modes, prefix),
                ),
                (
                    "Where tokens were chosen, % of all tokens of the mode.",
                    figures.exit_figure(modes, depth, prefix),
                ),
                (
                    "Accuracy against difficulty, with Wilson 95 % intervals. Modes whose tokens "
                    "are identical to dense share a line.",
                    figures.accuracy_by_difficulty_figure(modes, prefix),
                ),
                (
                    "Depth against difficulty: layers the loop ran per token (solid) and mean "
                    "layer at which tokens were chosen (dashed).",
                    figures.depth_by_difficulty_figure(modes, depth, prefix),
                ),
                (
                    "Where the deliberation gate took rounds: rounds per 100 tokens against "
                    "difficulty. Exact mode takes the rounds of dense.",
                    figures.rounds_by_difficulty_figure(modes, prefix),
                ),
            )
            if svg
        ],
        "rounds": [
            (mode, _rounds_row(summary.rounds, summary))
            for mode, summary in modes.items()
            if summary.rounds is not None
        ],
        "groups": [
            (name, _group_rows(modes, attribute))
            for name, attribute in (("difficulty", "by_difficulty"), ("subject", "by_subject"))
            if any(getattr(summary, attribute) for summary in modes.values())
        ],
        "sample_modes": shown,
        "samples": [
            (record, [(mode, record.modes[mode], _tokens(record, mode)) for mode in shown])
            for record in choose_samples(records, shown)
        ],
        "layers": sorted({x for mode in shown for x in modes[mode].exit_histogram} | {depth}),
        "facts": _facts(result),
        "config": json.dumps(result.config, indent=2, default=str),
    }


def _main_row(mode: str, summary: ModeSummary) -> list[Cell]:
    dense, stock = summary.versus_dense, summary.versus_transformers
    return [
        Cell(
            numbers.percent(summary.accuracy), numbers.percent_interval(summary.accuracy_interval)
        ),
        _difference_cell(dense),
        _spread_cell(summary.shown_ms_per_token),
        _spread_cell(summary.seconds),
        Cell(numbers.number(summary.layers_per_token)),
        _speed_cell(dense, summary.total, judged=mode not in BASELINES),
        _speed_cell(stock, summary.total),
        Cell(f"{dense.identical} / {dense.problems}") if dense else Cell("–"),
    ]


def _difference_cell(comparison: Comparison | None) -> Cell:
    if comparison is None:
        return Cell("–")
    test = comparison.mcnemar
    tone = "" if not test.distinguishable else "bad" if test.b > test.c else "good"
    interval = numbers.points_interval(comparison.accuracy_difference_interval)
    detail = f"{interval}\n{numbers.p_value(test.p)} (−{test.b} +{test.c})"
    return Cell(numbers.signed_points(comparison.accuracy_difference), detail, tone)


def _spread_cell(spread: Any) -> Cell:
    return Cell(numbers.number(spread.median), numbers.pair(spread.p90, spread.p99))


def _speed_cell(comparison: Comparison | None, total: int, judged: bool = True) -> Cell:
    if comparison is None:
        return Cell("–")
    estimate = comparison.speedup
    detail = numbers.ratio_interval(estimate.interval)
    if comparison.problems < total:
        detail += f"\nn = {comparison.problems}"
    tone = numbers.speed_tone(comparison) if judged else ""
    return Cell(numbers.ratio(estimate.value), detail, tone)


def _detail_row(summary: ModeSummary) -> list[Cell]:
    dense = summary.versus_dense
    accepted = summary.acceptance_rate
    return [
        Cell(str(summary.total)),
        Cell(f"{summary.tokens:,}"),
        Cell(numbers.number(summary.tokens_per_second)),
        _spread_cell(summary.ms_per_token),
        Cell(numbers.number(summary.seconds_total)),
        Cell(numbers.number(summary.joules_per_token)),
        Cell(numbers.ratio(dense.time_ratio) if dense else "–"),
        Cell(numbers.number(summary.positions_per_token)),
        Cell(numbers.number(summary.mean_exit_layer)),
        Cell(numbers.percent(accepted) if accepted is not None else "–"),
        Cell(numbers.percent(dense.token_agreement) if dense else "–"),
        Cell(str(summary.truncated), tone="warn" if summary.truncated else ""),
    ]


def _answers_row(found: AnswerSummary) -> list[Cell]:
    counts = (found.flexible, found.strict, found.no_answer, found.cut_off)
    many = ["warn" if count > found.total / 10 else "" for count in counts]
    return [
        Cell(numbers.percent(count / found.total), f"{count} / {found.total}", tone)
        for count, tone in zip(counts, ("", "", *many[2:]), strict=True)
    ]


def _rounds_row(rounds: RoundsSummary, summary: ModeSummary) -> list[Cell]:
    often = ", ".join(f"{numbers.visible(p)!r} {n}" for p, n in rounds.pieces.items())
    return [
        Cell(f"{rounds.total:,}"),
        Cell(numbers.number(rounds.per_token)),
        Cell(f"{rounds.tokens:,} / {summary.tokens:,}"),
        Cell(f"{rounds.problems} / {summary.total}"),
        Cell(often or "–"),
    ]


def _group_rows(
    modes: Mapping[str, ModeSummary], attribute: str
) -> list[tuple[str, list[tuple[str, int, list[Cell]]]]]:
    """Rows grouped by difficulty or subject, one line per mode within each."""
    tables = {
        mode: {row.group: row for row in getattr(summary, attribute)}
        for mode, summary in modes.items()
    }
    grouped = []
    for group in dict.fromkeys(key for table in tables.values() for key in table):
        lines = []
        for mode, table in tables.items():
            if row := table.get(group):
                cells = [
                    Cell(
                        numbers.percent(row.correct / row.total),
                        numbers.percent_interval(row.interval),
                    ),
                    Cell(numbers.number(row.mean_exit_layer)),
                    Cell(numbers.number(row.layers_per_token)),
                ]
                lines.append((mode, row.total, cells))
        grouped.append((group, lines))
    return grouped


def _tokens(record: ProblemRecord, mode: str) -> list[Token]:
    outcome = record.modes[mode]
    dense: ModeOutcome | None = record.modes.get("dense") if mode != "dense" else None
    split = first_difference(outcome.tokens, dense.tokens) if dense else -1
    shown = []
    for index, (piece, layer) in enumerate(zip(outcome.pieces, outcome.exit_layers, strict=True)):
        tooltip = f"layer {layer}"
        if outcome.confidences:
            tooltip += f", confidence {outcome.confidences[index]:.3f}"
        rounds = outcome.rounds[index] if outcome.rounds else 0
        if rounds:
            tooltip += f", {rounds} round{'s' if rounds > 1 else ''} of the gate"
        if index == split and dense:
            other = dense.pieces[index] if index < len(dense.pieces) else "nothing more"
            tooltip += f"; dense has {other!r} here: the two part"
        shown.append(Token(numbers.visible(piece), layer, tooltip, index == split, rounds))
    return shown


def _facts(result: EvaluationResult) -> list[tuple[str, str]]:
    model, task = result.model, result.task
    return [
        ("Run", f"{result.name}, {result.created}"),
        ("Task", f"{task['name']}, split {task['split']}, {task['problems']} problems"),
        ("Data SHA-256", task["data_sha256"]),
        (
            "Model",
            f"{model['name']}: {model['architecture']}, {model['parameters']:,} parameters, "
            f"{model['num_layers']} layers, exits after {numbers.plain(model['exits'])}",
        ),
        ("Model SHA-256", model["sha256"]),
        ("Configuration SHA-256", result.config_sha256),
        *((str(key), numbers.plain(value)) for key, value in result.environment.items()),
        ("Load before", numbers.plain(result.load["before"])),
        ("Load after", numbers.plain(result.load["after"])),
        ("Warm-up, not in any figure", f"{result.warmup_seconds:.2f} s"),
    ]


def _comparison_rows(results: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    return [
        (
            result.name,
            [(m, [Cell(str(s.total)), *_main_row(m, s)]) for m, s in result.modes.items()],
        )
        for result, _ in results
    ]
