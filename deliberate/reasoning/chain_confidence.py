"""Confidence of the tokens of a chain, and chains that are ended for want of it.

DeepConf (Fu et al., 2025, arXiv:2508.15260): a token's confidence is minus the mean log-probability
of its `top` most likely candidates; a chain is as confident as its weakest window of tokens. Here
the window is a share of the chain's usual length, so that short chains have one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deliberate.engine.constraints import LogitConstraint, SteadyMask
from deliberate.utils.checks import at_least

OWN = 0
"""In place of a number of candidates: the log-probability of the token itself is taken."""


@dataclass(frozen=True)
class ConfidenceWatch:
    """What is watched in a chain.

    Attributes:
        top: candidates of a token that its confidence is the mean of; `OWN`: its own
            log-probability.
        window: tokens that are taken together.
        least: the chain is ended once a whole window's mean is below; None: never.
    """

    top: int = 20
    window: int = 64
    least: float | None = None

    def __post_init__(self) -> None:
        at_least("top", self.top, OWN)
        at_least("window", self.window, 1)

    def weak(self, confidences: Sequence[float]) -> bool:
        """Whether the newest window is below the limit."""
        if self.least is None or len(confidences) < self.window:
            return False
        return sum(confidences[-self.window :]) / self.window < self.least


def weakest_window(confidences: Sequence[float], window: int) -> float:
    """The lowest mean of `window` neighbouring tokens, or of all where there are fewer; else 0."""
    size = min(window, len(confidences))
    if not size:
        return 0.0
    total = sum(confidences[:size])
    least = total
    for new, old in zip(confidences[size:], confidences[:-size], strict=True):
        total += new - old
        least = min(least, total)
    return least / size


@dataclass
class WatchedConstraint:
    """A constraint that also records the confidence of every token that follows its start.

    Args:
        inner: decides what may come next.
        top: see `ConfidenceWatch`.

    Attributes:
        confidences: of the tokens so far; a forced token has that of the token before it, and with
            `OWN` log-probability 0.
    """

    inner: LogitConstraint
    top: int
    confidences: list[float] = field(default_factory=list, init=False)
    _now: float | None = field(default=None, init=False)
    _scores: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def finished(self) -> bool:
        """As the inner one."""
        return self.inner.finished

    def mask(self, scores: Tensor) -> Tensor:
        """As the inner one; the confidence is taken of the scores before it."""
        if self.top == OWN:
            self._scores = scores.clone()  # its memory is used again before the token is known
            return self.inner.mask(scores)
        likely = torch.log_softmax(scores.float(), dim=-1).topk(min(self.top, len(scores)))
        self._now = -float(likely.values.mean())
        return self.inner.mask(scores)

    def advance(self, token: int) -> None:
        """As the inner one."""
        self.inner.advance(token)
        self.confidences.append(self._confidence(token))
        self._now = self._scores = None

    def steady(self) -> SteadyMask | None:
        """As the inner one, where the confidence is the token's own."""
        said = getattr(self.inner, "steady", None)
        return None if said is None or self.top != OWN else said()

    def passed(self, token: int, logprob: float) -> None:
        """As `advance`, of a token with this log-probability."""
        self.inner.advance(token)
        self.confidences.append(logprob)
        self._now = self._scores = None

    def rollback(self, count: int) -> None:
        """As the inner one."""
        self.inner.rollback(count)
        if count:
            del self.confidences[-count:]
        self._now = self._scores = None

    def forced(self) -> list[int]:
        """As the inner one."""
        return self.inner.forced()

    def _confidence(self, token: int) -> float:
        if self.top == OWN:
            if self._scores is None:
                return 0.0
            scores = self._scores.float()
            return float(scores[token] - torch.logsumexp(scores, dim=-1))
        if self._now is not None:
            return self._now
        return self.confidences[-1] if self.confidences else 0.0
