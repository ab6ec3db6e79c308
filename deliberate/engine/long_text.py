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
a position, so exact mode verifies drafts against the model with its watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

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
    """States of the generated tokens of one sequence, and the statistics computed from them.

    Attributes:
        distances: of each state to the nearest before it.
        until: index of the first token that is no longer re-weighed, as known at each state.
    """

    def __init__(self) -> None:
        self._units: Tensor | None = None
        self._total: Tensor | None = None  # sum of all states that are held
        self.distances: list[float] = []
        self.until: list[int] = []

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
        index: tells it from the others of its watch.
        trace: gets the triggers.
        records: generated tokens.
    """

    index: int
    trace: GenerationTrace
    records: list[TokenRecord]


class LongTextWatch:
    """The watch over the sequences of one batch.

    A state that is observed again, as after a rollback, replaces the old one and all after it.

    Args:
        config: when to re-weigh, and how.
    """

    def __init__(self, config: LongTextConfig) -> None:
        self._config = config
        self._histories: dict[int, _History] = {}

    def observe(self, sequence: Watched, first: int, hidden: Tensor) -> None:
        """Adds the final states ``[M, d]`` that the tokens at `first`.. of the output follow from.

        Raises:
            RuntimeError: states in between are missing.
        """
        history = self._histories.setdefault(sequence.index, _History())
        if first > len(history.distances):
            raise RuntimeError(
                f"sequence {sequence.index}: state {first} was given, the next one is "
                f"{len(history.distances)}"
            )
        history.cut(first)
        triggers = sequence.trace.triggers
        while triggers and triggers[-1].index >= first:
            triggers.pop()
        config = self._config
        variances = history.add(unit_states(hidden))
        for index, variance in enumerate(variances, start=first):
            until = history.until[index - 1] if index else 0
            if index >= config.window:  # the very first state has none to compare with
                window = history.distances[index - config.window + 1 : index + 1]
                mean = sum(window) / config.window
                statistic = mean / variance if variance > 1e-6 else 0.0
                if statistic < config.threshold:
                    if index >= until:
                        triggers.append(Trigger(index, statistic))
                    until = index + config.tokens
            history.until.append(until)

    def reweigh(
        self,
        rows: Sequence[Watched],
        firsts: Sequence[int],
        counts: Sequence[int],
        logits: Tensor,
    ) -> Tensor:
        """Re-weighed logits ``[N, V]`` of tokens whose states were observed; others stay.

        Changes a copy. All tokens before the last must be in the row's records.

        Args:
            firsts, counts: of each row, the index of its first token and how many.
        """
        config = self._config
        changed: dict[int, Tensor] = {}
        place = 0
        for sequence, first, count in zip(rows, firsts, counts, strict=True):
            history = self._histories.get(sequence.index)
            if history is None:  # of another watch, or of none
                place += count
                continue
            for index in range(first, first + count):
                if 0 < index < history.until[index]:
                    made = [record.token for record in sequence.records[:index]]
                    tokens = torch.tensor(made, device=logits.device)
                    units = history.units(index + 1)
                    penalty = penalties(
                        units[:-1], units[-1], tokens, logits.shape[-1], config.sharpness
                    )
                    changed[place] = (config.strength * penalty).to(logits.dtype)
                place += 1
        if changed:
            logits = logits.clone()
        for place, loss in changed.items():
            logits[place] -= loss
        return logits

    def active(self, sequence: Watched) -> bool:
        """Whether the next token is to be re-weighed, by the states observed so far."""
        history = self._histories.get(sequence.index)
        return bool(history and history.until and len(sequence.records) < history.until[-1])

    def close(self, sequences: Sequence[Watched]) -> None:
        """At the end: keeps in the traces only what belongs to the output."""
        for sequence in sequences:
            trace, records = sequence.trace, sequence.records
            trace.triggers = [one for one in trace.triggers if one.index < len(records)]
            until = self._histories[sequence.index].until
            # Tokens that exited early were not re-weighed, whatever the statistic was later.
            trace.reweighed = sum(
                index < end and record.verified
                for index, (record, end) in enumerate(zip(records, until, strict=False))
            )
