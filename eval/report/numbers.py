"""Figures as words: number formats and the plain statements that open a report."""

from __future__ import annotations

from typing import Any

from deliberate.eval.runner.results import EvaluationResult
from deliberate.eval.runner.summary import Comparison, ModeSummary
from deliberate.eval.statistics import Interval

_MINUS = "\N{MINUS SIGN}"


def number(value: float | None) -> str:
    """About three significant digits, thousands grouped; a dash for None."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 or value == 0 else 3
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """0.725 -> 72.5 %"""
    return f"{100 * share:.1f} %"


def percent_interval(interval: Interval) -> str:
    """Interval of a proportion, in per cent."""
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def signed_points(difference: float) -> str:
    """-0.01 -> −1.0 (percentage points)"""
    rounded = round(100 * difference, 1)
    sign = _MINUS if rounded < 0 else "+" if rounded > 0 else ""
    return f"{sign}{abs(rounded):.1f}"


def points_interval(interval: Interval) -> str:
    """Interval of a difference, in percentage points."""
    return f"[{signed_points(interval.low)}, {signed_points(interval.high)}]"


def p_value(p: float) -> str:
    """p = 0.60, or p < 0.001 where more digits would say nothing."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"


def ratio(value: float) -> str:
    """1.9 -> 1.90×"""
    return f"{value:.2f}×"


def ratio_interval(interval: Interval | None) -> str:
    """Interval of a ratio."""
    return "no interval" if interval is None else f"[{interval.low:.2f}, {interval.high:.2f}]"


def pair(p90: float, p99: float) -> str:
    """P90 and P99 of a spread."""
    return f"{number(p90)} · {number(p99)}"


def plain(value: Any) -> str:
    """A value of free form (environment, load) on one line."""
    if value is None or value == "":
        return "not recorded"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def visible(piece: str) -> str:
    """A token's text with what cannot be seen made visible; newlines are kept after their sign."""
    if not piece:
        return "∅"
    shown = []
    for letter in piece:
        if letter == "\n":
            shown.append("↵\n")
        elif letter == "\t":
            shown.append("⇥")
        elif letter == " " or letter.isprintable():
            shown.append(letter)
        else:
            shown.append(f"⟨{ord(letter):X}⟩")
    return "".join(shown)


def speed_tone(comparison: Comparison) -> str:
    """ "good" or "bad" where the interval excludes 1 and the wall clock agrees, else ""."""
    interval = comparison.speedup.interval
    if interval is None:
        return ""
    if interval.low > 1:
        return "good" if comparison.time_ratio > 1 else "warn"
    return "bad" if interval.high < 1 else ""


def lead(result: EvaluationResult) -> str:
    """One sentence: what ran, on what, how many problems, how good dense is."""
    task, model = result.task, result.model
    text = (
        f"{model['name']} ({model['parameters'] / 1e6:.1f} M parameters, {model['num_layers']} "
        f"layers) on {task['problems']} problems of {task['name']}, batch 1, greedy."
    )
    for mode in ("dense", "transformers"):
        if summary := result.modes.get(mode):
            return (
                f"{text} At full depth it answers {percent(summary.accuracy)} "
                f"{percent_interval(summary.accuracy_interval)} correctly{_by_mark(summary)}, "
                f"at {number(summary.shown_ms_per_token.median)} ms per token, prompt pass "
                "included."
            )
    return text


def _by_mark(summary: ModeSummary) -> str:
    """The accuracy by the task's mark alone, where the headline counts other forms too."""
    found = summary.answers
    if found is None or found.strict == summary.correct:
        return ""
    return f" ({percent(found.strict / found.total)} behind the task's mark)"


def statements(result: EvaluationResult) -> list[tuple[str, str, str]]:
    """(mode, statement, tone) for every mode that has a baseline to be held against."""
    found = []
    for mode, summary in result.modes.items():
        if mode == "transformers":
            continue
        baseline = "dense" if summary.versus_dense else "transformers"
        comparison = summary.versus_dense or summary.versus_transformers
        if comparison is None:
            found.append((mode, "ran alone: nothing to compare it with.", ""))
            continue
        text, tone = _statement(mode, baseline, comparison)
        kept, broken = _guarantee(mode, result, summary)
        found.append((mode, kept + text, "bad" if broken else tone))
    return found


def _guarantee(mode: str, result: EvaluationResult, summary: ModeSummary) -> tuple[str, bool]:
    """The clause about a mode's guarantee, and whether the run speaks against it."""
    if mode == "certified" and result.certified is not None:
        info = result.certified
        text = f"{info.risk} risk at most {percent(info.epsilon)} (δ = {percent(info.delta)}, "
        text += f"n = {info.n})"
        return text + (": expired by drift; " if info.alarm else "; "), info.alarm
    if mode == "budget" and summary.budget is not None and result.budget is not None:
        held = summary.budget
        share = f"{percent(held.within / held.total)} {percent_interval(held.within_interval)}"
        return f"{result.budget.budget}: {share} of answers within it; ", False
    return "", False


def _statement(mode: str, baseline: str, comparison: Comparison) -> tuple[str, str]:
    name = "dense" if baseline == "dense" else "transformers' generate"
    same = comparison.identical == comparison.problems
    identity = f"{comparison.identical} of {comparison.problems} problems token-identical to {name}"
    speed, tone = _speed(comparison, name), speed_tone(comparison)
    if same:
        return f"{identity}; {speed}.", tone
    if mode == "exact" and baseline == "dense":
        return f"not exact: only {identity}; {accuracy(comparison)}; {speed}.", "bad"
    if mode == "dense":
        return f"{identity}; {accuracy(comparison)}; {speed}.", tone or "warn"
    if comparison.mcnemar.distinguishable and comparison.mcnemar.b > comparison.mcnemar.c:
        tone = "bad"
    return f"{accuracy(comparison)}; {speed}; {identity}.", tone


def accuracy(comparison: Comparison) -> str:
    """Accuracy against the baseline in words, with the verdict of the paired test."""
    test = comparison.mcnemar
    verdict = "cannot distinguish the two"
    if test.distinguishable:
        verdict = "a loss" if test.b > test.c else "a gain"
    interval = points_interval(comparison.accuracy_difference_interval)
    difference = f"accuracy {signed_points(comparison.accuracy_difference)} points {interval}"
    return f"{difference}, McNemar {p_value(test.p)}: {verdict}"


def _speed(comparison: Comparison, baseline: str) -> str:
    estimate = comparison.speedup
    figure = f"{ratio(estimate.value)} {ratio_interval(estimate.interval)}"
    if estimate.interval is None:
        return f"{ratio(estimate.value)} its speed per token on one problem, which shows nothing"
    if 1.0 in estimate.interval:
        return f"speed per token cannot be distinguished from {baseline}: {figure}"
    if estimate.interval.high < 1:
        return f"slower than {baseline}: {figure} its speed per token"
    if comparison.time_ratio <= 1:
        return (
            f"{figure} its speed per token, yet no speedup: the answers are longer, and all "
            f"problems together take {ratio(1 / comparison.time_ratio)} the time"
        )
    return (
        f"{figure} its speed per token, {ratio(comparison.time_ratio)} over all problems together"
    )
