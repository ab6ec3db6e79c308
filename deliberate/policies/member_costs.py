"""Seconds per token of every member of a policy family here: full depth, exact, and each lambda.

A guarantee chooses among all of them, so it is never slower, and never less right, than full depth
or exact mode where these fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deliberate.calibration.stopping_policy import PolicyTable, StepCosts
from deliberate.config import MAX_CALL_STEPS
from deliberate.cost.model import CostModel
from deliberate.cost.parts import PassCost, SegmentCost, WarmCost


@dataclass(frozen=True)
class MemberCosts:
    """Expected seconds per step of a batch, in which every sequence gets one token.

    Attributes:
        dense: full depth, no exit evaluated.
        exact: exact mode at its best lambda; dense where drafts do not pay.
        rows: of each lambda of the table.
        least: of the fastest of them, and of the earliest exit for every token.
        prompt: seconds of the prompts' pass.
    """

    dense: float
    exact: float
    rows: tuple[float, ...]
    least: float
    prompt: float


def member_costs(
    cost: CostModel,
    table: PolicyTable,
    *,
    max_pending: int,
    context: float,
    prompt_tokens: int = 1,
    batch: int = 1,
) -> MemberCosts:
    """The costs of a table's members on the machine of a cost model.

    Args:
        context: tokens cached, on average over the response.
        prompt_tokens: of the longest prompt.
    """
    prompt = cost.prompt_seconds(prompt_tokens, batch)
    whole = batched(cost, batch)
    dense = whole.dense_seconds_per_token(context)
    if whole.multi_step is not None:
        top = whole.num_exits
        calls = whole.multi_step.calls[top] / MAX_CALL_STEPS + whole.multi_step.step_seconds(
            top, context
        )
        dense = min(dense, calls)
    rows = tuple(
        _row_seconds(whole, row, share, extra, max_pending, context)
        for row, share, extra in zip(table.rows, table.shares, _rounds(whole, table), strict=True)
    )
    exact = min(
        (
            _exact_seconds(whole, seconds, share, risk, max_pending)
            for seconds, share, risk in zip(rows, table.shares, table.risks, strict=True)
        ),
        default=dense,
    )
    least = min(whole.least_seconds_per_token(max_pending, context), *rows)
    return MemberCosts(dense, min(dense, exact), rows, min(least, dense), prompt)


def batched(cost: CostModel, batch: int) -> CostModel:
    """A cost model whose passes and reads over one sequence cost what those over `batch` do."""
    if batch == 1:
        return cost
    return dataclasses.replace(
        cost,
        segments=tuple(_segment(segment, batch) for segment in cost.segments),
        reads=tuple(_warm(read, batch) for read in cost.reads),
        head=_pass(cost.head, batch),
        multi_step=None,  # several steps in one call are for one sequence
    )


def _segment(segment: SegmentCost, batch: int) -> SegmentCost:
    several = _warm(segment.several, batch)
    return SegmentCost(several, several, _pass(segment.prompt, batch))


def _warm(cost: WarmCost, batch: int) -> WarmCost:
    return WarmCost(_pass(cost.cold, batch), cost.saved)


def _pass(cost: PassCost, batch: int) -> PassCost:
    return PassCost(cost.base, cost.per_row * batch, cost.per_key * batch, cost.per_pair * batch)


def _rounds(cost: CostModel, table: PolicyTable) -> Sequence[float]:
    return [cost.round_seconds * more for more in table.rounds or (0.0,) * len(table.rows)]


def _row_seconds(
    cost: CostModel,
    thresholds: Sequence[float],
    shares: Sequence[float],
    rounds: float,
    max_pending: int,
    context: float,
) -> float:
    """One row: an exit whose threshold is infinite is not evaluated, and costs nothing."""
    kept = [k for k, threshold in enumerate(thresholds) if threshold < math.inf]
    whole = cost.restricted([cost.layers[k] for k in kept])
    if not kept:
        return whole.dense_seconds_per_token(context) + rounds
    steps = StepCosts(whole.first_seconds(context), whole.continuation_seconds(context))
    taken = [shares[k] for k in (*kept, len(thresholds))]
    mean = float(np.dot(taken, steps.by_exit())) + rounds
    return whole.policy_seconds([mean], max_pending, context)[0]


def _exact_seconds(
    cost: CostModel, row: float, shares: Sequence[float], risk: float, max_pending: int
) -> float:
    """Exact mode at a row: tokens that exit are drafts, lost from the first disagreement on.

    A cycle drafts as many tokens as exit one after the other on average, and then runs one more to
    the top with them; the head reads all of them. Drafts are accepted independently.
    """
    exit_share = 1.0 - shares[-1]
    if exit_share <= 0.0:
        return row
    drafts = float(max_pending)
    if exit_share < 1.0:
        drafts = min(drafts, exit_share / (1.0 - exit_share))
    wrong = min(1.0, risk / exit_share)
    accepted = drafts if wrong == 0.0 else (1.0 - (1.0 - wrong) ** drafts) / wrong
    cycle = row * (drafts + 1.0) + cost.head.per_row * drafts
    return cycle / (min(accepted, drafts) + 1.0)
