"""Long text: detects repetition in the final hidden states and makes it less likely.

Text that degenerates repeats itself: the state before a token is close to an earlier one. The
spread of a window's states does not show it, for the states of a loop are as far from one another
as those of good text. What collapses is the part of the variance that earlier states do not
explain: the squared distance of each state to the nearest one before it. Below a threshold the
logits of the next tokens are re-weighed: a token that followed a state like the present one loses
up to `strength` nats (for the unlikelihood of repeating, see Welleck et al., arXiv:1908.04319; for
the similarity of states as its sign, Su et al., arXiv:2202.06417).

Both use the generated tokens and their states, never the prompt: copying from the prompt is not
repetition. Everything is a function of the final hidden states and tokens up to
a position, so exact mode verifies drafts against the model with its watch. A token that a
constraint forces has a state like any other, though nothing is chosen there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deliberate.engine.constraints import ConstraintCursor
from deliberate.engine.long_text_config import LongTextConfig
from deliberate.trace import GenerationTrace, TokenRecord, Trigger

_ROOM = 128


def unit_states(states: Tensor) -> Tensor:
    """``[..., d]`` at length 1, in float32 at least."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return states / torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp_(min=1e-12)


def nearest_distances(units: Tensor, first: int = 0) -> Tensor:
    """Squared distance of each state to the nearest before it.

    Args:
        units: ``[T, d]`` of length 1, oldest first.
        first: only of the states from here on.

    Returns:
        ``[T - first]`` in [0, 4]; 4 for the very first state, which has none before it.
    """
    if len(units) == 1:
        return units.new_full((1,), 4.0)
    if first == len(units) - 1:
        cosines = units[first:] @ units[:first].T
    else:
        places = torch.arange(len(units), device=units.device)
        cosines = (units[first:] @ units.T).masked_fill(places >= places[first:, None], -1.0)
    return cosines.amax(dim=1).mul_(-2.0).add_(2.0).clamp_(min=0.0)


def penalties(
    units: Tensor, state: Tensor, tokens: Tensor, vocabulary: int, sharpness: float
) -> Tensor:
    """How much each token repeats what followed similar states, ``[V]`` in [0, 1].

    Args:
        units: earlier states ``[T, d]`` of length 1.
        state: the present one, ``[d]`` of length 1.
        tokens: the token that followed each earlier state, ``[T]`` int64.
    """
    weights = torch.exp(-sharpness * (1.0 - units @ state)).clamp_(max=1.0)
    return weights.new_zeros(vocabulary).scatter_reduce_(0, tokens, weights, "amax")


class _History:
    """States of the generated tokens of one text, and the statistics computed from them.

    Attributes:
        distances: of each state to the nearest before it.
        statistics: unexplained share of the variance at each state; infinite where not defined.
        until: index of the first token that is no longer re-weighed, as known at each state.
    """

    def __init__(self) -> None:
        self._units: Tensor | None = None
        self._total: Tensor | None = None  # sum of all states that are held
        self.distances: list[float] = []
        self.statistics: list[float] = []
        self.until: list[int] = []

    def copy(self) -> _History:
        """An equal one that goes its own way."""
        new = _History()
        new._units = None if self._units is None else self._units.clone()
        new._total = self._total
        new.distances, new.statistics = list(self.distances), list(self.statistics)
        new.until = list(self.until)
        return new

    def units(self, count: int) -> Tensor:
        """The first `count` states."""
        assert self._units is not None
        return self._units[:count]

    def add(self, units: Tensor) -> list[float]:
        """Appends ``[M, d]``; the variance of all states up to each of them."""
        first, end = len(self.distances), len(self.distances) + len(units)
        if self._units is None or end > len(self._units):
            self._units = _wider(self._units, first, end, units)
        self._units[first:end] = units
        sums = units.cumsum(dim=0) if len(units) > 1 else units
        if first:
            before = self._units[:first].sum(dim=0) if self._total is None else self._total
            sums = sums + before
        self._total = sums[-1]
        nearest = nearest_distances(self._units[:end], first)
        # Both in one copy to the host.
        values = torch.stack((nearest, sums.square().sum(dim=1))).tolist()
        self.distances += values[0]
        # Of vectors of length 1: the mean square is 1, so the variance is what the mean leaves.
        return [1.0 - length / (first + i + 1) ** 2 for i, length in enumerate(values[1])]

    def cut(self, count: int) -> None:
        """Drops all but the first `count` states."""
        if count < len(self.distances):
            self._total = None
        del self.distances[count:]
        del self.statistics[count:]
        del self.until[count:]


def _wider(old: Tensor | None, held: int, needed: int, like: Tensor) -> Tensor:
    room = max(_ROOM, needed, 2 * held)
    new = torch.zeros((room, like.shape[1]), dtype=like.dtype, device=like.device)
    if old is not None:
        new[:held] = old[:held]
    return new


class Watched(Protocol):
    """What the watch reads of a sequence.

    Attributes:
        index: names it in errors.
        trace: gets the triggers.
        records: generated tokens.
        constraint: names those of them that it forced; None: there is none.
    """

    index: int
    trace: GenerationTrace
    constraint: ConstraintCursor | None
    records: list[TokenRecord]


class LongTextWatch:
    """The watch over one text, which one request makes, or several that continue one another.

    A state that is observed again, as after a rollback, replaces the old one and all after it.

    Args:
        config: when to re-weigh, and how.
        history: of another watch, at the same place of the text; None: none yet.
    """

    def __init__(self, config: LongTextConfig, history: _History | None = None) -> None:
        self.config = config
        self._history = _History() if history is None else history
        self._earlier: list[int] = []

    @property
    def earlier(self) -> int:
        """Generated tokens of earlier requests, the last ones of the present one's prompt."""
        return len(self._earlier)

    def follow(self, tokens: Sequence[int]) -> None:
        """The next request's prompt ends with these tokens, all of them generated."""
        self._earlier = list(tokens)

    def fork(self) -> LongTextWatch:
        """The watch of another continuation of the text so far."""
        new = LongTextWatch(self.config, self._history.copy())
        new.follow(self._earlier)
        return new

    def statistic(self, index: int) -> float:
        """Unexplained share of the variance before generated token `index` of the text.

        Infinite where it is not known: before a window of tokens was made, or not run yet.
        """
        known = self._history.statistics
        return known[index] if index < len(known) else math.inf

    def observe(self, sequence: Watched, first: int, hidden: Tensor) -> None:
        """Adds the final states ``[M, d]`` that the tokens at `first`.. of the output follow from.

        A negative index is of a token that an earlier request generated.

        Raises:
            RuntimeError: states in between are missing.
        """
        history, earlier = self._history, len(self._earlier)
        at = first + earlier
        if at > len(history.distances):
            raise RuntimeError(
                f"sequence {sequence.index}: state {at} was given, the next one is "
                f"{len(history.distances)}"
            )
        history.cut(at)
        triggers = sequence.trace.triggers
        while triggers and triggers[-1].index >= first:
            triggers.pop()
        config = self.config
        variances = history.add(unit_states(hidden))
        for index, variance in enumerate(variances, start=at):
            until = history.until[index - 1] if index else 0
            statistic = math.inf
            if index >= config.window:  # the very first state has none to compare with
                window = history.distances[index - config.window + 1 : index + 1]
                mean = sum(window) / config.window
                statistic = mean / variance if variance > 1e-6 else 0.0
                if statistic < config.threshold:
                    if index >= max(until, earlier):
                        triggers.append(Trigger(index - earlier, statistic))
                    until = index + config.tokens
            history.statistics.append(statistic)
            history.until.append(until)

    def reweigh(self, sequence: Watched, first: int, logits: Tensor) -> Tensor:
        """Re-weighed logits ``[M, V]`` of the tokens at `first`.., whose states were observed.

        Returns a copy where any is changed. All tokens before the last must be in the records.
        """
        config, earlier = self.config, len(self._earlier)
        if not config.strength:
            return logits
        changed: dict[int, Tensor] = {}
        for place in range(len(logits)):
            index = first + earlier + place
            if 0 < index < self._history.until[index]:
                made = [record.token for record in sequence.records[: first + place]]
                tokens = torch.tensor(self._earlier + made, device=logits.device)
                units = self._history.units(index + 1)
                penalty = penalties(
                    units[:-1], units[-1], tokens, logits.shape[-1], config.sharpness
                )
                changed[place] = (config.strength * penalty).to(logits.dtype)
        if changed:
            logits = logits.clone()
        for place, loss in changed.items():
            logits[place] -= loss
        return logits

    def active(self, sequence: Watched) -> bool:
        """Whether the next token is to be re-weighed, by the states observed so far."""
        until, next_ = self._history.until, len(self._earlier) + len(sequence.records)
        return bool(self.config.strength and until and next_ < until[-1])

    def close(self, sequence: Watched) -> None:
        """At the end: keeps in the trace only what belongs to the output."""
        trace, records = sequence.trace, sequence.records
        forced = set() if sequence.constraint is None else sequence.constraint.places
        end = len(records)
        while end and end - 1 in forced:  # nobody needs to run the layers for the last ones
            end -= 1
        trace.triggers = [one for one in trace.triggers if one.index < end]
        until = self._history.until[len(self._earlier) :]
        # Not re-weighed: tokens that exited early, whatever the statistic was later, and such as
        # a constraint forced.
        trace.reweighed = sum(
            len(self._earlier) + index < last and record.verified and index not in forced
            for index, (record, last) in enumerate(zip(records, until, strict=False))
        ) * bool(self.config.strength)
