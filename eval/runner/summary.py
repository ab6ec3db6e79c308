"""Summaries of a run: every mode on its problems, and against the baselines on the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deliberate.eval.runner.deliberation_rounds import RoundsSummary, summarise_rounds
from deliberate.eval.runner.outcomes import ModeOutcome, ProblemRecord, first_difference
from deliberate.eval.statistics import (
    Estimate,
    Interval,
    McNemar,
    Spread,
    bootstrap_ratio_of_medians,
    mcnemar_exact,
    paired_difference_interval,
    percentiles,
    wilson_interval,
)
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_records import ADDED

DEFAULT_MODES = ("transformers", "dense", "exact", "threshold")
MODE_ORDER = (*DEFAULT_MODES, "certified", "budget")


@dataclass(frozen=True)
class Comparison:
    """A mode against a baseline, on the `problems` that both ran.

    Attributes:
        identical: problems on which the two token sequences are equal.
        token_agreement: tokens before the first difference, over the longer of the two answers,
            both summed over problems. What follows a difference has another context and counts
            as disagreement even where a token happens to be the same.
        speedup: median seconds per token of the baseline over the mode's, prompt pass included;
            above 1 = the mode is faster.
        time_ratio: total seconds of the baseline over the mode's. It tells a faster answer from
            a longer answer of faster tokens.
        accuracy_difference: accuracy of the mode minus the baseline's, Newcombe's paired interval.
    """

    problems: int
    identical: int
    token_agreement: float
    speedup: Estimate
    time_ratio: float
    accuracy_difference: float
    accuracy_difference_interval: Interval
    mcnemar: McNemar


@dataclass(frozen=True)
class BudgetSummary:
    """Answers of budget mode against their budget.

    Attributes:
        total: answers under a budget.
        within: no slower than allowed by the controller's clock, which starts with the decode loop.
        within_whole: the same by the wall clock of the whole call of `generate`.
        within_interval: Wilson's, of `within`.
        guarded: share of decode steps at which the hard guard held.
        expected_disagreement: share of all tokens expected to differ from full depth.
        speed: median of the machine's factor against the cost model.
    """

    total: int
    within: int
    within_whole: int
    within_interval: Interval
    guarded: float
    expected_disagreement: float
    speed: float


@dataclass(frozen=True)
class AnswerSummary:
    """How the final answers of a mode were found.

    Attributes:
        strict: answers correct behind the task's mark, as lm-evaluation-harness's strict match.
        flexible: answers correct wherever the final answer is found in the text, as its flexible
            extraction, which takes the last number; here a mark, a box and a statement come first.
        no_answer: texts in which the task's style finds no answer.
        cut_off: answers that met the length limit.
    """

    total: int
    strict: int
    strict_interval: Interval
    flexible: int
    flexible_interval: Interval
    no_answer: int
    cut_off: int


@dataclass(frozen=True)
class GroupRow:
    """A mode on the problems of one difficulty or subject."""

    group: str
    total: int
    correct: int
    interval: Interval
    mean_exit_layer: float | None
    layers_per_token: float | None


@dataclass(frozen=True)
class ModeSummary:
    """A mode on all problems it ran. None = not reported by the mode.

    Times: `ms_per_token` is wall clock over the tokens after the first, the prompt pass left out;
    `ms_per_token_whole` that of the whole answer over all its tokens, prompt pass included, as in
    every comparison; `tokens_per_second` and `seconds` include it too.

    `layers_per_token` is layer calls over decode steps (one pass over m positions is one call),
    `positions_per_token` the positions in those calls over decode steps; `acceptance_rate` is
    1 - rejected / drafted, in modes that verify drafts; `truncated` counts answers that met the
    length limit; `joules_per_token` is of the whole machine, prompt pass included.
    """

    total: int
    correct: int
    accuracy: float
    accuracy_interval: Interval
    seconds_total: float
    seconds: Spread
    ms_per_token: Spread
    tokens: int
    tokens_per_second: float
    layers_per_token: float | None
    positions_per_token: float | None
    mean_exit_layer: float | None
    exit_histogram: dict[int, int]
    acceptance_rate: float | None
    truncated: int
    versus_dense: Comparison | None
    versus_transformers: Comparison | None
    by_difficulty: list[GroupRow]
    by_subject: list[GroupRow]
    budget: BudgetSummary | None = field(default=None, metadata=ADDED)
    rounds: RoundsSummary | None = field(default=None, metadata=ADDED)
    answers: AnswerSummary | None = field(default=None, metadata=ADDED)
    ms_per_token_whole: Spread | None = field(default=None, metadata=ADDED)
    joules_per_token: float | None = field(default=None, metadata=ADDED)

    @property
    def shown_ms_per_token(self) -> Spread:
        """What is shown as "ms per token": the prompt pass included, as in every speed."""
        return self.ms_per_token_whole or self.ms_per_token


def summarise(records: Sequence[ProblemRecord], *, num_layers: int) -> dict[str, ModeSummary]:
    """Summaries of every mode that occurs, in reading order (`MODE_ORDER`, then by name).

    A mode may cover some of the problems only; comparisons use the problems both modes ran.

    Raises:
        DeliberateError: no records, a repeated id, or an exit layer outside 0..num_layers.
    """
    if not records:
        raise DeliberateError("no problems to summarise: at least one record is needed")
    repeated = [name for name, count in Counter(r.id for r in records).items() if count > 1]
    if repeated:
        raise DeliberateError(f"problem id {repeated[0]!r} occurs more than once")
    for record in records:
        for mode, outcome in record.modes.items():
            outside = [layer for layer in outcome.exit_layers if not 0 <= layer <= num_layers]
            if outside:
                raise DeliberateError(
                    f"problem {record.id!r}, {mode}: "
                    f"exit layer {outside[0]} is not in 0..{num_layers}"
                )
    present = {mode for record in records for mode in record.modes}
    ordered = [m for m in MODE_ORDER if m in present] + sorted(present - set(MODE_ORDER))
    return {mode: _summarise_mode(mode, records) for mode in ordered}


def _summarise_mode(mode: str, records: Sequence[ProblemRecord]) -> ModeSummary:
    covered = [record for record in records if mode in record.modes]
    outcomes = [record.modes[mode] for record in covered]
    timed = [
        o for o in outcomes if o.tokens
    ] or outcomes  # no tokens: the prompt filled the context
    correct = sum(o.correct for o in outcomes)
    tokens, seconds = sum(len(o.tokens) for o in outcomes), sum(o.seconds for o in outcomes)
    drafted = sum(o.drafted for o in outcomes)
    difficulties = sorted({r.difficulty for r in covered if r.difficulty is not None})
    subjects = sorted({r.subject for r in covered if r.subject is not None})
    return ModeSummary(
        total=len(outcomes),
        correct=correct,
        accuracy=correct / len(outcomes),
        accuracy_interval=wilson_interval(correct, len(outcomes)),
        seconds_total=seconds,
        seconds=percentiles([o.seconds for o in timed]),
        ms_per_token=percentiles([o.ms_per_step for o in timed]),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        layers_per_token=_per_step(outcomes, [o.layer_passes for o in outcomes]),
        positions_per_token=_per_step(outcomes, [o.layer_positions for o in outcomes]),
        mean_exit_layer=_mean_exit_layer(outcomes),
        exit_histogram=dict(sorted(Counter(x for o in outcomes for x in o.exit_layers).items())),
        acceptance_rate=(
            1 - sum(o.rejected for o in outcomes) / drafted
            if drafted and any(o.verifies(mode) for o in outcomes)
            else None
        ),
        truncated=sum(o.finish == "length" for o in outcomes),
        versus_dense=_compare(mode, "dense", records),
        versus_transformers=_compare(mode, "transformers", records),
        by_difficulty=[_group(mode, covered, "difficulty", d) for d in difficulties],
        by_subject=[_group(mode, covered, "subject", s) for s in subjects],
        budget=_budget(outcomes),
        rounds=summarise_rounds(mode, covered),
        ms_per_token_whole=percentiles([1000 * o.seconds_per_token for o in timed]),
        answers=_answers(outcomes),
        joules_per_token=_joules_per_token(timed),
    )


def _joules_per_token(outcomes: Sequence[ModeOutcome]) -> float | None:
    counted = [(o.joules, len(o.tokens)) for o in outcomes if o.joules is not None]
    if not counted:
        return None
    return sum(joules for joules, _ in counted) / max(1, sum(tokens for _, tokens in counted))


def _answers(outcomes: Sequence[ModeOutcome]) -> AnswerSummary | None:
    """None for records of earlier releases, which hold one verdict an answer."""
    if any(o.strict is None or o.flexible is None for o in outcomes):
        return None
    strict = sum(bool(o.strict) for o in outcomes)
    flexible = sum(bool(o.flexible) for o in outcomes)
    return AnswerSummary(
        total=len(outcomes),
        strict=strict,
        strict_interval=wilson_interval(strict, len(outcomes)),
        flexible=flexible,
        flexible_interval=wilson_interval(flexible, len(outcomes)),
        no_answer=sum(o.predicted is None for o in outcomes),
        cut_off=sum(o.finish == "length" for o in outcomes),
    )


def completed(
    modes: Mapping[str, ModeSummary], records: Sequence[ProblemRecord]
) -> dict[str, ModeSummary]:
    """Summaries with what results of earlier releases lack, taken from the records.

    These state no time with the prompt pass, and drafts of modes that verify none.
    """
    found = {}
    for mode, summary in modes.items():
        outcomes = [record.modes[mode] for record in records if mode in record.modes]
        timed = [o for o in outcomes if o.tokens] or outcomes
        if summary.ms_per_token_whole is None and timed:
            whole = percentiles([1000 * o.seconds_per_token for o in timed])
            summary = replace(summary, ms_per_token_whole=whole)
        if not any(o.verifies(mode) for o in outcomes):
            summary = replace(summary, acceptance_rate=None)
        found[mode] = summary
    return found


def _budget(outcomes: Sequence[ModeOutcome]) -> BudgetSummary | None:
    kept = [(o, o.budget) for o in outcomes if o.budget is not None]
    if not kept:
        return None
    tokens, steps = sum(len(o.tokens) for o, _ in kept), sum(o.steps for o, _ in kept)
    within = sum(b.met for _, b in kept)
    return BudgetSummary(
        total=len(kept),
        within=within,
        within_whole=sum(b.met_whole for _, b in kept),
        within_interval=wilson_interval(within, len(kept)),
        guarded=sum(b.guarded for _, b in kept) / max(1, steps),
        expected_disagreement=sum(len(o.tokens) * b.expected_disagreement for o, b in kept)
        / max(1, tokens),
        speed=percentiles([b.speed for _, b in kept]).median,
    )


def _per_step(outcomes: Iterable[ModeOutcome], counts: Sequence[int]) -> float | None:
    steps = sum(outcome.steps for outcome in outcomes)
    return sum(counts) / steps if steps and sum(counts) else None


def _mean_exit_layer(outcomes: Iterable[ModeOutcome]) -> float | None:
    layers = [layer for outcome in outcomes for layer in outcome.exit_layers]
    return sum(layers) / len(layers) if layers else None


def _group(mode: str, records: Iterable[ProblemRecord], key: str, value: int | str) -> GroupRow:
    outcomes = [record.modes[mode] for record in records if getattr(record, key) == value]
    correct = sum(outcome.correct for outcome in outcomes)
    return GroupRow(
        group=str(value),
        total=len(outcomes),
        correct=correct,
        interval=wilson_interval(correct, len(outcomes)),
        mean_exit_layer=_mean_exit_layer(outcomes),
        layers_per_token=_per_step(outcomes, [o.layer_passes for o in outcomes]),
    )


def _compare(mode: str, baseline: str, records: Sequence[ProblemRecord]) -> Comparison | None:
    pairs = [
        (r.modes[mode], r.modes[baseline])
        for r in records
        if mode in r.modes and baseline in r.modes
    ]
    if mode == baseline or not pairs:
        return None
    timed = [(a, b) for a, b in pairs if a.tokens and b.tokens] or pairs
    table = Counter((a.correct, b.correct) for a, b in pairs)
    gained, lost = table[True, False], table[False, True]
    longest = sum(max(len(a.tokens), len(b.tokens)) for a, b in pairs)
    prefix = sum(first_difference(a.tokens, b.tokens) for a, b in pairs)
    return Comparison(
        problems=len(pairs),
        identical=sum(a.tokens == b.tokens for a, b in pairs),
        token_agreement=prefix / longest if longest else 1.0,
        speedup=bootstrap_ratio_of_medians(
            [b.seconds_per_token for _, b in timed], [a.seconds_per_token for a, _ in timed]
        ),
        time_ratio=sum(b.seconds for _, b in pairs) / sum(a.seconds for a, _ in pairs),
        accuracy_difference=(gained - lost) / len(pairs),
        accuracy_difference_interval=paired_difference_interval(
            table[True, True], gained, lost, table[False, False]
        ),
        mcnemar=mcnemar_exact(b=lost, c=gained),
    )
