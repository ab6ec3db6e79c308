"""Guarantees in words: what they are, whether they were met, and what estimates say of it."""

from __future__ import annotations

from deliberate.eval.report.numbers import accuracy, number, percent, percent_interval
from deliberate.eval.runner.guarantees import BudgetInfo, CertifiedInfo
from deliberate.eval.runner.results import EvaluationResult
from deliberate.eval.runner.summary import BudgetSummary, Comparison
from deliberate.eval.statistics import wilson_interval

Fact = tuple[str, str, str]
_SHORT = 12  # letters of a hash


def certified_facts(result: EvaluationResult) -> list[Fact]:
    """Name, value and tone of everything that certified mode guarantees; empty without it."""
    info, summary = result.certified, result.modes.get("certified")
    if info is None:
        return []
    versus = None if summary is None else summary.versus_dense
    facts = [
        ("Guarantee", guarantee(info), ""),
        (
            "Tested on",
            f"{info.n} problems, mean loss {percent(info.observed)}; lambda "
            + ("without limit" if info.price is None else f"{info.price:.3g}")
            + ("" if info.band is None else f", gate threshold {info.band:.3g}"),
            "",
        ),
        ("Bound to", _hashes(info), ""),
        (
            "Holds for",
            ", ".join(f"{name} {value!r}" for name, value in info.conditions.items()),
            "",
        ),
    ]
    if info.departures:
        facts.append(("Does not hold here", "; ".join(info.departures), "warn"))
    if versus is not None:
        facts.append(("In this run", accuracy(versus), ""))
        if info.risk == "accuracy":
            facts.append(("Its risk in this run", *observed_loss(info, versus)))
    facts.append(("Drift", *drift(info)))
    return facts


def guarantee(info: CertifiedInfo) -> str:
    """The guarantee in one clause."""
    what = {
        "accuracy": "problems that dense solves and this mode does not",
        "token": "tokens of an answer that differ from full depth",
    }.get(info.risk, info.risk)
    return (
        f"{what}: at most ε = {percent(info.epsilon)} expected, with probability at least 1 − δ = "
        f"{percent(1 - info.delta)} over the draw of {info.n} testing problems"
    )


def observed_loss(info: CertifiedInfo, versus: Comparison) -> tuple[str, str]:
    """Share of problems lost to dense against epsilon, and its tone."""
    lost, total = versus.mcnemar.b, versus.problems
    interval = wilson_interval(lost, total)
    text = f"{lost} of {total} problems lost, {percent(lost / total)} {percent_interval(interval)}"
    if interval.low > info.epsilon:
        return f"{text}: above ε, the guarantee is not met", "bad"
    if interval.high <= info.epsilon:
        return f"{text}: below ε", "good"
    return f"{text}: these problems alone do not settle whether it is below ε", ""


def drift(info: CertifiedInfo) -> tuple[str, str]:
    """State of the drift monitor, and its tone."""
    seen = (
        f"{info.disagreements} of {info.tokens} tokens re-evaluated at full depth disagree, in "
        f"{info.answers} answers; the limit is {info.limit:.2%} an answer"
    )
    if info.alarm:
        return f"alarm, the certificate has expired: {seen}", "bad"
    return f"no alarm: {seen} (evidence {info.evidence:.3g}, alarm at {info.alarm_at:.3g})", ""


def budget_facts(result: EvaluationResult) -> list[Fact]:
    """Name, value and tone of everything about the latency budget; empty without it."""
    info, summary = result.budget, result.modes.get("budget")
    if info is None:
        return []
    facts = [
        ("Budget", info.budget, ""),
        ("Feasibility", info.feasibility, "warn" if info.tight or not info.feasible else ""),
    ]
    if info.refused:
        facts.append(("Refused before decoding", f"{info.refused} problems", "warn"))
    held = None if summary is None else summary.budget
    if held is not None:
        facts += [
            ("Within the budget", *within(held)),
            (
                "Estimated risk",
                f"{held.expected_disagreement:.2%} of tokens expected to differ from full depth, "
                "by the calibrated probability of each at its exit",
                "",
            ),
            (
                "Controller",
                f"hard guard at {percent(held.guarded)} of decode steps; this machine took "
                f"{number(held.speed)} times what the cost model gives",
                "",
            ),
        ]
    return facts


def within(held: BudgetSummary) -> tuple[str, str]:
    """Share of answers within the budget, and its tone."""
    text = (
        f"{held.within} of {held.total} answers, {percent(held.within / held.total)} "
        f"{percent_interval(held.within_interval)}, from the start of the decode loop; "
        f"{held.within_whole} by the wall clock of the whole call"
    )
    return text, "good" if held.within >= 0.95 * held.total else "warn"


def guarantee_lines(result: EvaluationResult) -> list[str]:
    """The guarantees of a run, one line each, for a terminal."""
    lines = []
    if result.certified is not None:
        info = result.certified
        lines.append(f"certified: {guarantee(info)}; {drift(info)[0]}")
    if result.budget is not None:
        lines.append(f"budget: {_budget_line(result, result.budget)}")
    return lines


def _budget_line(result: EvaluationResult, info: BudgetInfo) -> str:
    summary = result.modes.get("budget")
    held = None if summary is None else summary.budget
    if held is None:
        return info.feasibility
    return (
        f"{within(held)[0]}; estimated risk {held.expected_disagreement:.2%} of tokens; "
        f"{info.feasibility}"
    )


def _hashes(info: CertifiedInfo) -> str:
    named = (
        ("weights", info.weights),
        ("exits", info.exits),
        ("policy", info.policy),
        ("problems", info.data),
    )
    return ", ".join(f"{name} {value[:_SHORT]}" for name, value in named)
