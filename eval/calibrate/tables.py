"""A calibration run as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deliberate.calibration.certificate import Certificate, Testing, problems_needed
from deliberate.calibration.comparison import RuleAtRisk
from deliberate.eval.calibrate.command import CalibrationRun

_SHOWN_LAMBDAS = 8


def print_calibration(console: Console, run: CalibrationRun) -> None:
    """Calibration error, policy, comparison of rules and certificates."""
    console.print(_exits_table(run))
    console.print(_policy_table(run))
    if run.comparison:
        console.print(_comparison_table(run.comparison, run.calibration.policy.steps.unit))
    risk, cost = run.published
    console.print(
        f"thresholds as published (0.85 to 0.95, rising) on held-out problems: "
        f"{100 * risk:.3f} % of tokens disagree, {_cost(run, cost)} a token",
        soft_wrap=True,
    )
    for name, testing in run.testing.items():
        console.print(f"{name}: {_outcome(run, str(name), testing)}", soft_wrap=True)
    for note in run.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"calibration: {run.path}", markup=False, soft_wrap=True)


def _exits_table(run: CalibrationRun) -> Table:
    held = run.calibration.meta["held_out"]
    groups = sorted({name for _, by_group in run.reliability for name in by_group})
    table = _table(
        f"calibration error on {held['sequences']} held-out problems ({held['tokens']} tokens)",
        ("exit", "agrees", "error", *groups),
    )
    calibration = run.calibration
    for layer, (overall, by_group) in zip(calibration.layers, run.reliability, strict=True):
        agreeing = sum(b.agreeing for b in overall.bins) / overall.tokens
        table.add_row(
            str(layer),
            f"{100 * agreeing:.2f} %",
            f"{100 * overall.ece:.3f} %",
            *(f"{100 * by_group[name].ece:.2f} %" if name in by_group else "-" for name in groups),
        )
    return table


def _policy_table(run: CalibrationRun) -> Table:
    policy = run.calibration.policy
    headings = [f"exit {layer}" for layer in run.calibration.layers]
    table = _table(
        "policy: least score to exit at, by lambda; expected disagreement and cost a token",
        ("lambda", "disagreement", "cost", *headings),
    )
    last = len(policy.lambdas) - 1
    shown = sorted({round(i * last / (_SHOWN_LAMBDAS - 1)) for i in range(_SHOWN_LAMBDAS)})
    costs = policy.costs()
    for i in shown:
        table.add_row(
            f"{policy.lambdas[i]:.3g}",
            f"{100 * policy.risks[i]:.4f} %",
            _cost(run, costs[i]),
            *("never" if t == float("inf") else f"{t:.4f}" for t in policy.rows[i]),
        )
    return table


def _comparison_table(rows: Sequence[RuleAtRisk], unit: str) -> Table:
    risks = list(dict.fromkeys(row.risk for row in rows))
    scale, name_of_unit = (1e3, "ms") if unit == "seconds" else (1.0, unit)
    table = _table(
        "cost a token at equal disagreement over that of optimal stopping (95 % interval)",
        ("rule", *(f"{100 * risk:g} %" for risk in risks)),
        width=len("1.000-1.000"),
    )
    for name in dict.fromkeys(row.rule for row in rows):
        own = [row for row in rows if row.rule == name]
        if own[0] is rows[0]:
            cells = [f"{scale * row.cost:.3f}\n{name_of_unit}" for row in own]
        else:
            cells = [
                f"{row.ratio:.3f}\n{row.ratio_interval[0]:.3f}-{row.ratio_interval[1]:.3f}"
                for row in own
            ]
        table.add_row(name, *cells)
    return table


def _table(title: str, headings: Sequence[str], width: int | None = None) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True
    )
    for index, heading in enumerate(headings):
        if index == 0:
            table.add_column(heading)
        else:
            table.add_column(heading, justify="right", min_width=width)
    return table


def _outcome(run: CalibrationRun, risk: str, testing: Testing) -> str:
    found = [c for c in run.calibration.certificates if str(c.risk) == risk]
    if not found:
        return testing.refusal() + _as_size(run, testing)
    certificate: Certificate = found[0]
    policy = run.calibration.policy
    place = policy.lambdas.index(certificate.lambda_)
    ratio = policy.steps.dense / policy.costs()[place]
    return (
        f"certified at epsilon={certificate.epsilon:g}, delta={certificate.delta:g} on "
        f"{certificate.n} problems: lambda {certificate.lambda_:.3g}, observed loss "
        f"{certificate.observed:.2g}, {_cost(run, policy.costs()[place])} a token expected (to "
        f"full depth, with every exit evaluated: {ratio:.2f} times as much)"
    )


def _as_size(run: CalibrationRun, testing: Testing) -> str:
    """How many problems to calibrate on so that enough of them test; empty where none would do."""
    first = testing.tests[0]
    if first.mean >= testing.epsilon:
        return ""
    tested = problems_needed(testing.epsilon, testing.delta, first.mean)
    share = float(run.calibration.meta["config"]["fit_share"])
    return f" for testing alone, which is size={math.ceil(tested / (1 - share))} or more"


def _cost(run: CalibrationRun, cost: float) -> str:
    unit = run.calibration.policy.steps.unit
    return f"{1e3 * cost:.3g} ms" if unit == "seconds" else f"{cost:.3g} {unit}"
