"""What decoding costs on one machine, in seconds: the model that policies and budgets use.

The cost of a segment (the layers between two exits) is an affine function of the sizes of a pass
through it, with coefficients fitted to measurements (`deliberate.cost.measure`). Everything here is
arithmetic on a `CostModel`: predicted time of a generation, costs of further layers, the least time
per token that any policy can reach.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from deliberate.cost.parts import DeliberationCost, MultiStepCost, PassCost, SegmentCost, WarmCost
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import build_from, file_key

FORMAT_VERSION = 1
# Context at which an exit is judged where the caller names none.
TYPICAL_CONTEXT = 128


@dataclass(frozen=True)
class CostModel:
    """Seconds of every part of decoding, for one model on one machine.

    Attributes:
        layers: exit layers, rising; empty for a model without exits.
        num_layers: decoder layers.
        segments: one more than exits, first layers first.
        reads: evaluating one exit, by rows: norm and score, with the full head unless `gated`.
        head: the model's own norm and head with the choice of a token, by rows.
        step: one decode step's share that belongs to no layer: token, positions, embedding.
        memory: how slowly weights leave and re-enter the processor's cache (`Staleness`).
        gated: exits decide by a gate and run the head only for a token that exits.
        thinking: of the model's deliberation gate; None without one.
        ahead: of steps taken several in one call; None where the executor does not.
        fit_error: median relative error of the fit on the measurements it was made from.
        fit_error_p90: the 90th percentile of the same.
        fingerprint: what this model was measured for (`deliberate.cost.measure.fingerprint`).
        facts: device, threads, versions and date of the measurement, JSON-ready.

    Raises:
        DeliberateError: counts that do not fit together, or a cost that is not a number >= 0.
    """

    layers: tuple[int, ...]
    num_layers: int
    segments: tuple[SegmentCost, ...]
    reads: tuple[WarmCost, ...]
    head: PassCost
    step: float = 0.0
    memory: float = 0.0
    gated: bool = False
    deliberation: Annotated[DeliberationCost | None, file_key("thinking")] = None
    multi_step: Annotated[MultiStepCost | None, file_key("ahead")] = None
    fit_error: float = 0.0
    fit_error_p90: float = 0.0
    fingerprint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        exits = len(self.layers)
        if len(self.segments) != exits + 1 or len(self.reads) != exits:
            raise DeliberateError(
                f"{exits} exits need {exits + 1} segments and {exits} reads, got "
                f"{len(self.segments)} and {len(self.reads)}"
            )
        depths = [0, *self.layers, self.num_layers]
        if self.multi_step is not None and len(self.multi_step.steps) != exits + 1:
            raise DeliberateError(
                f"{exits} exits need {exits + 1} multi-step calls, got {len(self.multi_step.steps)}"
            )
        if any(low >= high for low, high in itertools.pairwise(depths)):
            raise DeliberateError(
                f"exit layers {list(self.layers)} must rise within 1..{self.num_layers - 1}"
            )
        if not 0.0 <= self.memory < 1.0:
            raise DeliberateError(f"cost memory = {self.memory} is outside [0, 1)")
        for name in ("step", "fit_error", "fit_error_p90"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DeliberateError(f"cost {name} = {value}: it must be finite and at least 0")

    # -- parts ---------------------------------------------------------------------------------

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layers below each exit, and last all of them."""
        return (*self.layers, self.num_layers)

    @property
    def num_exits(self) -> int:
        """Exits, the top not counted."""
        return len(self.layers)

    def segment_seconds(
        self,
        k: int,
        *,
        tokens: int = 1,
        context: float = TYPICAL_CONTEXT,
        batch: int = 1,
        staleness: float = 1.0,
    ) -> float:
        """Seconds of a pass of segment k (from 0) over `batch` sequences of `tokens` tokens.

        Args:
            staleness: share of the other layers run since, in [0, 1]; 1 is a cold cache.
        """
        return self.segments[k].seconds(batch, tokens, context, staleness)

    def read_seconds(self, k: int, rows: int = 1, staleness: float = 1.0) -> float:
        """Seconds of evaluating exit k (from 0)."""
        return self.reads[k].seconds(rows, 1, 0, staleness)

    @property
    def head_seconds(self) -> float:
        """Seconds of choosing one token at the top from its hidden state."""
        return self.head.seconds(1, 1, 0)

    @property
    def remember_seconds(self) -> float:
        """What a deliberation gate costs a pass at the top, rounds not counted."""
        return 0.0 if self.deliberation is None else self.deliberation.remember

    @property
    def round_seconds(self) -> float:
        """One round of a deliberation gate for one token; 0 without a gate."""
        return 0.0 if self.deliberation is None else self.deliberation.round_seconds

    @property
    def answer_seconds(self) -> float:
        """Full-depth choice of one token without rounds: head, and what the gate adds."""
        return self.head_seconds + self.remember_seconds

    def deferred_seconds(self, k: int, context: float = TYPICAL_CONTEXT) -> float:
        """What one more pending token adds to a catch-up pass of segment k."""
        several = self.segments[k].several.cold
        return several.per_row + several.per_pair * context

    def passed_on_seconds(self, k: int, context: float = TYPICAL_CONTEXT) -> float:
        """What running segment k now, alone, costs beyond running deferred in a later pass."""
        alone = self.segments[k].seconds(1, 1, context)
        return max(0.0, alone - self.deferred_seconds(k, context)) + self._pushed_out(k)

    def _pushed_out(self, k: int) -> float:
        """What the next token pays for the weights that segment k pushes out of the cache."""
        if k == 0:
            return 0.0
        saved = self.segments[0].single.saved + self.reads[0].saved
        ends = self.boundaries
        return saved * (ends[k] - ends[k - 1]) / (self.num_layers - ends[0])

    def first_seconds(self, context: float = TYPICAL_CONTEXT) -> float:
        """From a token's start to the first exit's answer (to the top's, without exits).

        With the first segment's weights at hand; what pushes them out is charged to going on.
        """
        answer = self.read_seconds(0, staleness=0.0) if self.layers else self.answer_seconds
        return self.step + self.segment_seconds(0, context=context, staleness=0.0) + answer

    def all_deferred_seconds(self, context: float = TYPICAL_CONTEXT) -> float:
        """What every token costs, deferred, in the segments above the first exit.

        `continuation_seconds` leaves it out, because no decision changes it; the time that a
        policy takes per token is its expected cost plus this.
        """
        return sum(self.deferred_seconds(k, context) for k in range(1, len(self.segments)))

    def continuation_seconds(
        self, context: float = TYPICAL_CONTEXT, *, deferred: bool = True
    ) -> tuple[float, ...]:
        """What going on from each exit costs up to the next decision, ``[K]``.

        The next segment for one token and the next exit's read (the head, at the top), less what
        the token would cost later where its layers are `deferred`, not skipped.
        """
        costs = []
        for k in range(self.num_exits):
            segment = self.passed_on_seconds(k + 1, context)
            if not deferred:
                segment = self.segment_seconds(k + 1, context=context) + self._pushed_out(k + 1)
            last = k + 1 == self.num_exits
            costs.append(segment + (self.answer_seconds if last else self.read_seconds(k + 1)))
        return tuple(costs)

    # -- whole tokens and generations ----------------------------------------------------------

    def dense_seconds_per_token(self, context: float = TYPICAL_CONTEXT) -> float:
        """One token through every layer, without exits and without deliberation rounds."""
        layers = sum(self.segment_seconds(k, context=context) for k in range(len(self.segments)))
        return self.step + layers + self.answer_seconds

    def least_seconds_per_token(
        self, max_pending: int, context: float = TYPICAL_CONTEXT, *, deferred: bool = True
    ) -> float:
        """Mean seconds of a token when all that can exit at the first exit do.

        With `deferred` layers, each `max_pending` tokens are followed by a full-depth pass over
        them and one more; never more than dense.
        """
        dense = self.dense_seconds_per_token(context)
        if not self.layers:
            return dense
        early = self.first_seconds(context) + (self.head_seconds if self.gated else 0.0)
        if not deferred:
            return min(dense, early)
        catch_up = sum(
            self.segment_seconds(k, tokens=max_pending + 1, context=context)
            for k in range(1, len(self.segments))
        )
        forced = self.step + self.segment_seconds(0, context=context) + catch_up
        cycle = max_pending * early + forced + self.answer_seconds
        return min(dense, cycle / (max_pending + 1))

    def policy_seconds(
        self,
        costs: Sequence[float],
        max_pending: int,
        context: float = TYPICAL_CONTEXT,
        *,
        deferred: bool = True,
    ) -> tuple[float, ...]:
        """Seconds per token that policies take, from the expected costs of their decisions.

        Args:
            costs: mean per token of `first_seconds` and of the `continuation_seconds` paid.
        """
        ridden = self.all_deferred_seconds(context) if deferred else 0.0
        least = self.least_seconds_per_token(max_pending, context, deferred=deferred)
        return tuple(max(least, cost + ridden) for cost in costs)

    def prompt_seconds(self, tokens: int, batch: int = 1) -> float:
        """The pass of `batch` prompts padded to `tokens`, and the choice of their first tokens."""
        layers = sum(segment.prompt.seconds(batch, tokens, tokens) for segment in self.segments)
        return self.step + layers + self.head.seconds(batch, 1, 0) + self.remember_seconds

    def restricted(self, layers: Sequence[int]) -> CostModel:
        """The same machine with only these of its exits: the segments between them are merged.

        Raises:
            DeliberateError: a layer that is none of its exits.
        """
        wanted = tuple(layers)
        if wanted == self.layers:
            return self
        for layer in wanted:
            if layer not in self.layers:
                raise DeliberateError(
                    f"layer {layer} is not an exit of this cost model; it has {list(self.layers)}"
                )
        edges = (0, *wanted, self.num_layers)
        ends = self.boundaries
        merged: list[SegmentCost] = []
        for low, high in itertools.pairwise(edges):
            inside = [s for s, end in zip(self.segments, ends, strict=True) if low < end <= high]
            merged.append(functools.reduce(operator.add, inside))
        kept = [self.layers.index(layer) for layer in wanted]
        multi_step = self.multi_step
        if multi_step is not None:
            places = [*kept, self.num_exits]
            multi_step = MultiStepCost(
                tuple(multi_step.calls[k] for k in places),
                tuple(multi_step.steps[k] for k in places),
            )
        return dataclasses.replace(
            self,
            layers=wanted,
            segments=tuple(merged),
            reads=tuple(self.reads[k] for k in kept),
            multi_step=multi_step,
        )

    # -- storage -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        raw = dataclasses.asdict(self)
        raw["thinking"], raw["ahead"] = raw.pop("deliberation"), raw.pop("multi_step")
        return {"format_version": FORMAT_VERSION} | raw | {"facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CostModel:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: another format, a missing or foreign entry.
        """
        version = raw.get("format_version") if isinstance(raw, Mapping) else None
        if version != FORMAT_VERSION:
            raise DeliberateError(
                f"cost model has format_version {version}; this release reads {FORMAT_VERSION}"
            )
        given = {key: value for key, value in raw.items() if key != "format_version"}
        return build_from(cls, given, "cost model")


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: ``1.9 ms``, ``42 us``, ``3.1 s``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
