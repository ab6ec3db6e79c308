"""Rounds of the deliberation gate over a run: how many, and where they fell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.eval.runner.outcomes import ModeOutcome, ProblemRecord

# How many token texts with the most deliberation rounds are named.
NAMED_PIECES = 8


@dataclass(frozen=True)
class RoundsSummary:
    """Rounds of one mode.

    Attributes:
        total: over all tokens of all answers.
        per_token: the same, for each token.
        tokens: that took a round.
        problems: with such a token in the answer.
        by_difficulty: rounds per token of the problems of each difficulty.
        pieces: the texts of tokens that took a round most often, and how often.
    """

    total: int
    per_token: float
    tokens: int
    problems: int
    by_difficulty: dict[str, float]
    pieces: dict[str, int]


def summarise_rounds(mode: str, records: Sequence[ProblemRecord]) -> RoundsSummary | None:
    """Of the records that have the mode; None where no gate was on."""
    found: list[tuple[ProblemRecord, ModeOutcome, list[int]]] = []
    for record in records:
        outcome = record.modes.get(mode)
        if outcome is not None and outcome.rounds is not None:
            found.append((record, outcome, outcome.rounds))
    if not found:
        return None
    totals: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    pieces: Counter[str] = Counter()
    for record, outcome, rounds in found:
        if record.difficulty is not None:
            totals[record.difficulty] += sum(rounds)
            lengths[record.difficulty] += len(rounds)
        pieces.update(p for p, r in zip(outcome.pieces, rounds, strict=True) if r)
    total = sum(sum(rounds) for *_, rounds in found)
    return RoundsSummary(
        total=total,
        per_token=total / max(1, sum(len(rounds) for *_, rounds in found)),
        tokens=sum(pieces.values()),
        problems=sum(any(rounds) for *_, rounds in found),
        by_difficulty={
            str(level): totals[level] / count for level, count in sorted(lengths.items()) if count
        },
        # of equally frequent ones the first by name, so that the same run gives the same bytes
        pieces=dict(sorted(pieces.items(), key=lambda pair: (-pair[1], pair[0]))[:NAMED_PIECES]),
    )
