"""Where exact mode does not repeat dense token for token, and by how small a gap of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deliberate.engine.spec import as_strict
from deliberate.engine.strict import NEAR_TIE
from deliberate.eval.runner.outcomes import Departure, ProblemRecord, first_difference

if TYPE_CHECKING:
    from deliberate.eval.runner.runner import Runner

# So many are written out; the results hold all of them.
SHOWN = 8


def departures(
    records: Sequence[ProblemRecord], mode: str = "exact", baseline: str = "dense"
) -> list[Departure]:
    """Problems on which `mode` does not repeat `baseline` token for token."""
    found = []
    for record in records:
        if mode in record.modes and baseline in record.modes:
            a, b = record.modes[mode].tokens, record.modes[baseline].tokens
            if a != b:
                found.append(Departure(record.id, first_difference(a, b)))
    return found


def with_gaps(
    runner: Runner,
    records: Sequence[ProblemRecord],
    found: Sequence[Departure],
    mode: str = "exact",
) -> list[Departure]:
    """The same with the gaps of dense's own logits: each answer is decoded again up to there."""
    by_id = {record.id: record for record in records}
    return [_with_gap(runner, by_id[one.problem], one, mode) for one in found]


def _with_gap(runner: Runner, record: ProblemRecord, one: Departure, mode: str) -> Departure:
    own, other = record.modes["dense"].tokens, record.modes[mode].tokens
    if one.position >= min(len(own), len(other)):
        return one
    scores = runner.dense_scores(one.problem, one.position)
    gap = float(scores[own[one.position]] - scores[other[one.position]])
    step = torch.finfo(runner.model.base.dtype).eps * float(scores.abs().max())
    near_tie = gap / step <= NEAR_TIE and as_strict(runner.settings.strict) is None
    return replace(one, gap=gap, steps=gap / step, near_tie=near_tie)


def departure_text(broken: Sequence[Departure]) -> str:
    """Where exact mode was not exact, with the gap of each difference, in one line."""
    places = ", ".join(f"{d.problem} at token {d.position}{_gap(d)}" for d in broken[:SHOWN])
    more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    ties = sum(one.near_tie for one in broken)
    if ties == len(broken):
        end = "all near-ties, which rounding decides; strict=true executor=generic makes it hold"
    elif ties:
        end = f"not as guaranteed; {ties} of {len(broken)} are near-ties, which rounding decides"
    else:
        end = "not as guaranteed"
    return f"exact departs from dense in {places}{more}: {end}."


def _gap(one: Departure) -> str:
    if one.gap is None or one.steps is None:
        return ""
    return f" (gap {one.gap:.3g} logits, {one.steps:.2g} rounding steps)"
