"""The budget sweep for reading: tables in a terminal, and a page with its figures."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deliberate.eval.benchmarks.budget_figures import curve_figure, standalone, step_figure
from deliberate.eval.benchmarks.budget_points import Against, BudgetRow
from deliberate.eval.benchmarks.budget_step import SOON, StepChange
from deliberate.eval.report import numbers
from deliberate.utils.files import write_text

if TYPE_CHECKING:
    from deliberate.eval.benchmarks.budget_result import Sweep

PAGE_FILE = "budget.html"
CURVE_FILE = "budget.svg"
MOST_OVERHEAD = 0.02


def budget_cells(row: BudgetRow) -> list[str]:
    """A budget as a line of a table."""
    answered = row.point.requests
    share = numbers.percent(row.within / answered)
    feasible = "–"
    if row.feasible:
        feasible = f"{numbers.percent(row.feasible_within / row.feasible)}\nof {row.feasible}"
    return [
        f"{row.ms:.2f}",
        str(row.refused),
        share,
        feasible,
        f"{row.point.ms_per_token:.2f}",
        f"{row.point.median:.2f}\n{row.point.p90:.2f}\n{row.point.p99:.2f}",
        f"{numbers.percent(row.point.accuracy)}\n{numbers.percent_interval(row.point.interval)}",
        against(row.against["fixed"]),
        against(row.against["random"]),
    ]


BUDGET_HEADS = (
    "budget\nms",
    "re-\nfused",
    "within",
    "of the\nfeasible",
    "mean\nms",
    "median\nP90\nP99",
    "accuracy\n[95 %]",
    "over fixed\ndepth",
    "over random\nexits",
)


def against(found: Against | None) -> str:
    """Accuracy over a baseline at no more time."""
    if found is None:
        return "none as\nfast"
    return f"{numbers.signed_points(found.difference)}\n{numbers.points_interval(found.interval)}"


def verdicts(sweep: Sweep, steps: Mapping[str, StepChange]) -> list[tuple[str, bool | None]]:
    """What was to be shown, in words, and whether it was; None where it cannot be said."""
    judged = [row for row in sweep.rows if row.holds is not None]
    held = sum(bool(row.holds) for row in judged)
    beaten = sum(row.dominates for row in sweep.rows)
    found: list[tuple[str, bool | None]] = [
        (
            f"{held} of {len(judged)} budgets are held by at least 95 % of the requests that the "
            "earliest exit would have answered with 10 % to spare",
            held == len(judged) if judged else None,
        ),
        (
            f"at {beaten} of {len(sweep.rows)} budgets no fixed depth and no random exits are more "
            "accurate in no more time",
            beaten == len(sweep.rows) if sweep.rows else None,
        ),
        (
            f"controller and policy take {sweep.overhead_us:.1f} us a token (medians), "
            f"{numbers.percent(sweep.overhead_share)} of its time under the strictest budget",
            sweep.overhead_share <= MOST_OVERHEAD if sweep.rows else None,
        ),
    ]
    found += [(step_text(name, step), step.recovered) for name, step in steps.items()]
    return found


def step_text(name: str, step: StepChange) -> str:
    """A step change in one sentence."""
    back = "never" if step.tokens_back is None else f"after {step.tokens_back} tokens"
    text = (
        f"machine {step.factor:g} times slower ({name}), budget {step.budget_ms:.2f} ms: back "
        f"within it {back} (means of {step.window})"
    )
    if step.planned_back is not None:
        text += f", its choices after {step.planned_back}"
    over = f"at most {numbers.percent(step.oscillation)} over"
    if step.planned_oscillation is not None:
        over += f", its choices {numbers.percent(step.planned_oscillation)}"
    return (
        f"{text}; later than {SOON} tokens {over}; "
        f"{step.ms_before:.2f} ms before, {step.ms_after:.2f} ms after"
    )


def show(
    sweep: Sweep, steps: Mapping[str, StepChange], facts: Mapping[str, Any], page: Path
) -> None:
    """Prints tables and verdicts."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    table = Table(
        title="latency budgets, ms per token (mean over the answer, prompt included)",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in BUDGET_HEADS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in sweep.rows:
        table.add_row(*budget_cells(row))
    console.print(table)
    table = Table(title="baselines", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("variant", "mean ms", "accuracy", "tokens"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for point in sweep.points:
        table.add_row(*point_cells(point))
    console.print(table)
    for ms in sweep.refused:
        console.print(f"budget {ms:.2f} ms: refused for every request")
    for text, good in verdicts(sweep, steps):
        mark = "?" if good is None else "yes" if good else "NO"
        console.print(f"{mark}: {text}", soft_wrap=True, markup=False)
    console.print(sentence(sweep, facts), soft_wrap=True, markup=False)
    console.print(f"page: {page}", soft_wrap=True, markup=False)


def point_cells(point: Any) -> list[str]:
    """A baseline as a line of a table."""
    return [
        point.name,
        f"{point.ms_per_token:.2f}",
        f"{numbers.percent(point.accuracy)} {numbers.percent_interval(point.interval)}",
        f"{point.tokens_per_request:.0f}",
    ]


def sentence(sweep: Sweep, facts: Mapping[str, Any]) -> str:
    """What was run, on what."""
    clock = {"wall": "wall clock", "cpu": "seconds of this process's own time"}[facts["clock"]]
    return (
        f"{facts['model']}, {facts['requests']} requests of {facts['task']} at batch 1, "
        f"{facts['threads']} thread(s), {clock}; load {facts['load']['before']} before, "
        f"{facts['load']['after']} after. A typical request takes {sweep.least_ms:.2f} ms per "
        f"token at the earliest exit and {sweep.dense_ms:.2f} ms at full depth; the machine took "
        f"{sweep.machine:.2f} times what the cost model gives."
    )


def write_figures(
    folder: Path, sweep: Sweep, steps: Mapping[str, StepChange], facts: Mapping[str, Any]
) -> Path:
    """Writes `budget.svg` and the page `budget.html`; returns the page's path."""
    curve = curve_figure(sweep.rows, sweep.points)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (
        files("deliberate.eval.benchmarks").joinpath("budget.html.j2").read_text(encoding="utf-8")
    )
    text = environment.from_string(source).render(
        facts=facts,
        lead=sentence(sweep, facts),
        verdicts=verdicts(sweep, steps),
        heads=BUDGET_HEADS,
        rows=[(budget_cells(row), row) for row in sweep.rows],
        refused=sweep.refused,
        points=[point_cells(point) for point in sweep.points],
        curve=curve,
        steps=[
            (step_text(name, step), step_figure(step, f"{name}-")) for name, step in steps.items()
        ],
    )
    write_text(folder / CURVE_FILE, standalone(curve))
    write_text(folder / PAGE_FILE, text)
    return folder / PAGE_FILE
