"""The record of one generation: where each token was chosen, and which passes were run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One generated token.

    Attributes:
        token: id.
        exit_layer: number of layers below the exit that chose it; `num_layers` at full depth, 0
            for a draft that was looked up in the text or a token that a constraint forced.
        confidence: of the exit that chose it, in [0, 1]; NaN in dense mode, which computes none.
        seconds: since generation began, when the token was chosen (exact mode: drafted).
        verified: the full-depth model predicted the same token (always so for tokens chosen at
            full depth).
        rounds: of the deliberation gate that were taken over it.
    """

    token: int
    exit_layer: int
    confidence: float
    seconds: float
    verified: bool
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Trigger:
    """Where a deliberation of a long text was triggered.

    Attributes:
        index: of the first token that it re-weighed.
        statistic: unexplained share of the variance in the window before that token.
    """

    index: int
    statistic: float


class PassRecord(NamedTuple):
    """One pass of one segment over a batch.

    Attributes:
        segment: its index, from the bottom.
        rows: sequences that took part.
        tokens: positions of each, padding included.
        keys: cache slots that it read: the longest context.
    """

    segment: int
    rows: int
    tokens: int
    keys: int


class MultiStepRecord(NamedTuple):
    """Several decode steps of one sequence that the executor took in one call.

    Attributes:
        first: index of their first pass in `BatchTrace.passes`, which lists them one by one.
        read: index of their first read in `BatchTrace.reads`.
        boundary: index of the exit at which they ended; the number of exits for full depth.
        steps: how many.
        evaluated: how many of them evaluated the exit head.
    """

    first: int
    read: int
    boundary: int
    steps: int
    evaluated: int


@dataclass
class GenerationTrace:
    """The record of one sequence; layer counts are of calls made, not inferred.

    In a batch, a call that serves several sequences counts for each of them.

    Attributes:
        num_layers: decoder layers of the model.
        prompt_tokens: tokens in the prompt.
        records: the tokens of the output, in order.
        layer_calls: calls of each layer after the prompt pass, ``[num_layers]``.
        layer_positions: positions of this sequence processed in those calls, ``[num_layers]``.
        drafted: tokens chosen at an exit, those rolled back included.
        rejected: exact mode: rollbacks, i.e. drafts that the full-depth model rejected.
        discarded: exact mode: tokens dropped by rollbacks, the rejected drafts included.
        prefill_seconds: until the first token.
        seconds: until the last.
        finish: "stop" or "length".
        near_ties: strict exact mode: tokens whose two best candidates were within the bound.
        run_again: strict exact mode: tokens that were run once more, one at a time, for them.
        triggers: of the watch over a long text, in order.
        reweighed: tokens of the output that it re-weighed.
    """

    num_layers: int
    prompt_tokens: int
    records: list[TokenRecord] = field(default_factory=list)
    layer_calls: list[int] = field(default_factory=list)
    layer_positions: list[int] = field(default_factory=list)
    drafted: int = 0
    rejected: int = 0
    discarded: int = 0
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    finish: str = "length"
    near_ties: int = 0
    run_again: int = 0
    triggers: list[Trigger] = field(default_factory=list)
    reweighed: int = 0

    def __post_init__(self) -> None:
        self.layer_calls = self.layer_calls or [0] * self.num_layers
        self.layer_positions = self.layer_positions or [0] * self.num_layers

    @property
    def tokens(self) -> list[int]:
        """Generated token ids."""
        return [record.token for record in self.records]

    @property
    def exit_layers(self) -> list[int]:
        """Where each token was chosen."""
        return [record.exit_layer for record in self.records]

    @property
    def exit_histogram(self) -> dict[int, int]:
        """Tokens by the layer where they were chosen."""
        return dict(sorted(Counter(self.exit_layers).items()))

    @property
    def verified(self) -> bool:
        """Whether every token was chosen or verified at full depth, as exact mode's are."""
        return all(record.verified for record in self.records)

    @property
    def rounds(self) -> int:
        """Rounds of the deliberation gate over the tokens of the output."""
        return sum(record.rounds for record in self.records)

    @property
    def layers_per_token(self) -> float:
        """Layer calls per decode step: the prompt pass yields the first token without one."""
        return sum(self.layer_calls) / max(1, len(self.records) - 1)

    @property
    def positions_per_token(self) -> float:
        """Positions through a layer per decode step: arithmetic, where calls are traffic."""
        return sum(self.layer_positions) / max(1, len(self.records) - 1)


@dataclass
class BatchTrace:
    """What a whole batch did together.

    Attributes:
        sequences: one trace each, in the order of the prompts.
        passes: every pass of every segment after the prompts, in order.
        reads: (exit, rows) of every call of the exit reader.
        runs: those of the passes and reads that were steps of one call.
        prefills: an engine: passes over prompts, and over what is run again, each segment by
            itself.
        deliberation_rounds: tokens in each round of the deliberation gate, in order.
        layer_calls: calls of each layer, one for all sequences that it serves.
        seconds: the whole generation.
        peak_pending: most tokens pending at once, over all exits and sequences.
        cache_bytes: of the KV buffers at the end.
    """

    sequences: list[GenerationTrace]
    passes: list[PassRecord] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    runs: list[MultiStepRecord] = field(default_factory=list)
    prefills: list[PassRecord] = field(default_factory=list)
    deliberation_rounds: list[int] = field(default_factory=list)
    layer_calls: list[int] = field(default_factory=list)
    seconds: float = 0.0
    peak_pending: int = 0
    cache_bytes: int = 0

    def append(self, more: BatchTrace) -> None:
        """Adds what another trace lists of passes and reads, after what is listed here."""
        passes, reads = len(self.passes), len(self.reads)
        self.runs += [
            one._replace(first=one.first + passes, read=one.read + reads) for one in more.runs
        ]
        self.passes += more.passes
        self.reads += more.reads
        self.prefills += more.prefills
        self.deliberation_rounds += more.deliberation_rounds

    def clear(self) -> None:
        """Empties the lists of passes and reads."""
        for steps in (self.passes, self.reads, self.runs, self.prefills):
            steps.clear()
        self.deliberation_rounds.clear()
