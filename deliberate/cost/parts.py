"""What a cost model is made of: passes as affine functions of their size, and cache effects.

A small model fits into the processor's cache in part, and then a segment that has just run is
cheaper to run again: nearly twice as cheap where it was measured. What decides is how much of the
rest has run in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of a pass over B sequences of m tokens with n tokens cached.

    ``base + per_row * B m + per_key * B n + per_pair * B m n``, every coefficient at least 0.
    """

    base: float
    per_row: float = 0.0
    per_key: float = 0.0
    per_pair: float = 0.0

    def __post_init__(self) -> None:
        for name in ("base", "per_row", "per_key", "per_pair"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DeliberateError(
                    f"cost {name} = {value}: seconds must be finite and at least 0"
                )

    def seconds(self, batch: int, tokens: int, context: float) -> float:
        """Seconds of one pass."""
        rows = batch * tokens
        return (
            self.base
            + rows * (self.per_row + self.per_pair * context)
            + self.per_key * batch * context
        )

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(
            self.base + other.base,
            self.per_row + other.per_row,
            self.per_key + other.per_key,
            self.per_pair + other.per_pair,
        )


@dataclass(frozen=True, slots=True)
class WarmCost:
    """A cost with its weights out of the processor's cache, and what is saved while they are in it.

    Attributes:
        cold: everything else has run since the last time.
        saved: seconds less when nothing else has.
    """

    cold: PassCost
    saved: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.saved < math.inf:
            raise DeliberateError(f"seconds saved {self.saved} must be finite and at least 0")

    def seconds(self, batch: int, tokens: int, context: float, staleness: float = 1.0) -> float:
        """Seconds of one pass; `staleness` as `Staleness.run` gives it."""
        warm = self.saved * (1.0 - staleness)
        return max(0.0, self.cold.seconds(batch, tokens, context) - warm)

    def __add__(self, other: WarmCost) -> WarmCost:
        return WarmCost(self.cold + other.cold, self.saved + other.saved)


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """One segment's passes, in the three kinds that differ in more than size.

    Attributes:
        single: one token of one sequence: matrix-vector products, no mask.
        several: catch-up passes and batches: matrix-matrix products under a mask.
        prompt: the first pass, on an empty cache, with its own length for the context.
    """

    single: WarmCost
    several: WarmCost
    prompt: PassCost

    def seconds(self, batch: int, tokens: int, context: float, staleness: float = 1.0) -> float:
        """Seconds of one pass after the prompt's; `staleness` as in `WarmCost`."""
        kind = self.single if batch * tokens == 1 else self.several
        return kind.seconds(batch, tokens, context, staleness)

    def __add__(self, other: SegmentCost) -> SegmentCost:
        return SegmentCost(
            self.single + other.single, self.several + other.several, self.prompt + other.prompt
        )


@dataclass(frozen=True, slots=True)
class DeliberationCost:
    """Seconds of a deliberation gate.

    Attributes:
        remember: of every pass that reaches the top: its states kept, and the top's probability.
        round: one round of so many tokens: the keys of their history, and the head after it.
    """

    remember: float
    round: PassCost

    def __post_init__(self) -> None:
        if not (math.isfinite(self.remember) and self.remember >= 0):
            raise DeliberateError(
                f"gate remember = {self.remember} s must be finite and at least 0"
            )

    @property
    def round_seconds(self) -> float:
        """One round of one token."""
        return self.round.seconds(1, 1, 0)


@dataclass(frozen=True, slots=True)
class MultiStepCost:
    """Seconds of steps that the executor takes several of in one call, nothing between them.

    Attributes:
        calls: of a call beside its steps, by the boundary that the steps go to, the top last.
        steps: of one step to that boundary, the choice of its token included; contexts count by
            ``per_key``.

    Raises:
        DeliberateError: a call that is not a number >= 0, or not one for every boundary.
    """

    calls: tuple[float, ...]
    steps: tuple[PassCost, ...]

    def __post_init__(self) -> None:
        if len(self.calls) != len(self.steps):
            raise DeliberateError(f"multi-step: {len(self.calls)} calls, {len(self.steps)} steps")
        for value in self.calls:
            if not (math.isfinite(value) and value >= 0):
                raise DeliberateError(f"multi-step call = {value} s must be finite and at least 0")

    def seconds(self, boundary: int, steps: int, context: float) -> float:
        """One call of so many steps, with `context` tokens cached before the first."""
        middle = context + (steps - 1) / 2
        return self.calls[boundary] + steps * self.steps[boundary].seconds(1, 1, middle)

    def step_seconds(self, boundary: int, context: float) -> float:
        """One step more of a call."""
        return self.steps[boundary].seconds(1, 1, context)


class Staleness:
    """How much of the processor's cache other layers have taken since a segment last ran.

    A pass finds the share of the other layers that ran since the segment's last pass. Caches that
    several levels and cores share forget and recover over some passes, so what counts is the
    decaying mean of that share; in a measurement where all layers ran once and then the first
    segment alone, its time fell over about four passes.
    """

    def __init__(self, boundaries: Sequence[int], memory: float) -> None:
        """
        Args:
            boundaries: layers below each exit, and last all of them.
            memory: weight of the past in the mean, in [0, 1).
        """
        top = len(boundaries) - 1
        depth = boundaries[-1]
        self._memory = memory
        self._since = [top] * (top + 1)
        self._value = [1.0] * (top + 1)
        self._shares: list[list[float]] = []
        for k, end in enumerate(boundaries):
            size = end - (boundaries[k - 1] if k else 0)
            others = depth - size
            self._shares.append(
                [1.0 if not others else max(0.0, (e - size) / others) for e in boundaries]
            )

    def run(self, segment: int) -> float:
        """Notes a pass of a segment; returns its staleness then, in [0, 1]."""
        since = self._since
        deepest = max(since[segment], segment)
        for other, seen in enumerate(since):
            if seen < segment:
                since[other] = segment
        since[segment] = segment
        share = self._shares[segment][deepest]
        value = share + self._memory * (self._value[segment] - share)
        self._value[segment] = value
        return value
