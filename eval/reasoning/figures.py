"""What an evaluation of reasoning has shown: figures of each variant, compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deliberate.eval.statistics import (
    Estimate,
    Interval,
    PairedAccuracy,
    paired_accuracy,
    ratio_of_sums,
    wilson_interval,
)

# Tokens or seconds count as saved below this ratio to the baseline's.
_SAVED = 0.98


@dataclass(frozen=True)
class Shown:
    """A probe as it is shown.

    Attributes:
        at: tokens of reasoning before it.
        answer: its final answer.
        right: whether that is the reference's.
    """

    at: int
    answer: str
    right: bool


@dataclass(frozen=True)
class Row:
    """One problem by one variant.

    Attributes:
        problem: its id.
        answer: final.
        right: whether it is the reference's.
        reasoning_tokens, tokens, probe_tokens: of all its chains; `tokens` without the probes'.
        chains: that were sampled.
        seconds: of the wall clock.
        stopped: why the first chain was ended, where a policy ended it.
        probes: of the first chain.
        length: tokens of reasoning of the first chain.
    """

    problem: str
    answer: str
    right: bool
    reasoning_tokens: int
    tokens: int
    probe_tokens: int
    chains: int
    seconds: float
    stopped: str | None = None
    probes: tuple[Shown, ...] = ()
    length: int = 0


@dataclass(frozen=True)
class Summary:
    """All problems by one variant.

    Attributes:
        name: of the variant.
        rows: one a problem.
        accuracy: Wilson's interval of it too.
        reasoning_tokens, chains, seconds: means of a problem.
        probe_share: of all tokens that were made.
        token_ratio, time_ratio: to the baseline, of all tokens made, and of seconds.
        against_baseline, against_control: accuracies on the same problems.
        control: name of the variant of the same compute.
        control_of: name of the variant that this is the control of.
    """

    name: str
    rows: Sequence[Row] = field(repr=False)
    accuracy: tuple[float, Interval]
    reasoning_tokens: float
    chains: float
    seconds: float
    probe_share: float
    token_ratio: Estimate
    time_ratio: Estimate
    against_baseline: PairedAccuracy
    control: str | None = None
    against_control: PairedAccuracy | None = None
    control_of: str | None = None

    @property
    def warning(self) -> str | None:
        """That tokens are saved and no time is, where it is so."""
        if self.token_ratio.value >= _SAVED or self.time_ratio.value < _SAVED:
            return None
        return (
            f"{self.name}: token saving without time saving: {self.token_ratio.value:.2f} of the "
            f"tokens in {self.time_ratio.value:.2f} of the time"
        )

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        from dataclasses import asdict

        return asdict(self) | {"warning": self.warning}


def summarize(
    name: str,
    rows: Sequence[Row],
    baseline: Sequence[Row],
    *,
    control: tuple[str, Sequence[Row]] | None = None,
    control_of: str | None = None,
) -> Summary:
    """The figures of a variant, on the problems of the baseline in their order."""
    right, total = sum(row.right for row in rows), len(rows)
    made = [row.tokens + row.probe_tokens for row in rows]
    own = [row.right for row in rows]

    def over(values: Sequence[float], others: Sequence[float]) -> Estimate:
        return ratio_of_sums(np.asarray(values, float), np.asarray(others, float))

    return Summary(
        name=name,
        rows=rows,
        accuracy=(right / total, wilson_interval(right, total)),
        reasoning_tokens=float(np.mean([row.reasoning_tokens for row in rows])),
        chains=float(np.mean([row.chains for row in rows])),
        seconds=float(np.mean([row.seconds for row in rows])),
        probe_share=sum(row.probe_tokens for row in rows) / max(1, sum(made)),
        token_ratio=over(made, [row.tokens + row.probe_tokens for row in baseline]),
        time_ratio=over([row.seconds for row in rows], [row.seconds for row in baseline]),
        against_baseline=paired_accuracy(own, [row.right for row in baseline]),
        control=None if control is None else control[0],
        against_control=(
            None if control is None else paired_accuracy(own, [row.right for row in control[1]])
        ),
        control_of=control_of,
    )
