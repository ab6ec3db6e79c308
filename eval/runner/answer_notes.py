"""Notes of a run about its answers: none found, cut off, and certificates that say nothing."""

from __future__ import annotations

from collections.abc import Mapping

from deliberate.calibration.certificate import Risk
from deliberate.eval.report.numbers import percent
from deliberate.eval.runner.guarantees import CertifiedInfo
from deliberate.eval.runner.summary import ModeSummary
from deliberate.eval.tasks.task import Task

# Shares of all answers above which the accuracy is more a matter of form than of what was solved.
_MANY = 0.1


def answer_notes(
    modes: Mapping[str, ModeSummary], task: Task, certified: CertifiedInfo | None
) -> list[str]:
    """What a reader has to know before reading an accuracy."""
    name = next((mode for mode in ("dense", "transformers") if mode in modes), next(iter(modes)))
    summary, notes = modes[name], []
    answers = summary.answers
    if answers is not None and answers.no_answer > _MANY * answers.total:
        advice = "" if task.style == "auto" else "; task.style=auto takes whatever is found"
        notes.append(
            f"No final answer was found in {answers.no_answer} of {answers.total} texts of {name}, "
            f"by task.style={task.style}{advice}."
        )
    if answers is not None and answers.cut_off > _MANY * answers.total:
        notes.append(
            f"{answers.cut_off} of {answers.total} answers of {name} were cut off at "
            f"max_new_tokens={task.max_new_tokens}: raise task.max_new_tokens to see their end."
        )
    if certified is not None and certified.risk == Risk.ACCURACY:
        note = says_nothing(summary.correct, summary.total, certified.epsilon)
        notes += [] if note is None else [f"This run: {note}."]
    return notes


def answer_lines(modes: Mapping[str, ModeSummary]) -> list[str]:
    """One line for each mode whose answers were not all found behind the task's mark."""
    lines = []
    for mode, summary in modes.items():
        found = summary.answers
        if found is None or (found.strict == found.flexible and not found.no_answer):
            continue
        lines.append(
            f"{mode}: correct {percent(found.flexible / found.total)} flexible, "
            f"{percent(found.strict / found.total)} strict; no answer found "
            f"{percent(found.no_answer / found.total)}, cut off "
            f"{percent(found.cut_off / found.total)}"
        )
    return lines


def says_nothing(solved: int, total: int, epsilon: float) -> str | None:
    """Why a certificate of accuracy is empty or weak for a model that solves little; else None.

    Its risk is the share of all problems that dense solves and the mode does not, which is at
    most the share that dense solves, whatever the exits do.
    """
    share = solved / total
    if share <= epsilon:
        return (
            f"dense solves {solved} of {total} problems ({share:.1%}), not more than epsilon = "
            f"{epsilon:.1%}: no exit can lose more than that, and a certificate of accuracy says "
            "nothing; certify the risk token instead"
        )
    if share < 10 * epsilon:
        return (
            f"dense solves {solved} of {total} problems ({share:.1%}): epsilon = {epsilon:.1%} of "
            f"all problems is {epsilon / share:.0%} of those that it solves"
        )
    return None
