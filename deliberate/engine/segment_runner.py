"""Runs segments for the sequences of a batch and keeps the states that are pending between them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.cache.pending_states import PendingStates
from deliberate.cache.unseen_slots import UnseenSlots
from deliberate.config import KVMode
from deliberate.engine.deliberation import GateRunner
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.backbone import Backbone
from deliberate.trace import BatchTrace, PassRecord

# Tokens of a prefill from which on it counts what a token takes, and how many such count.
_MANY, _LATEST = 16, 9


class SegmentRunner:
    """The layers, the cache and the pending states of one batch.

    Args:
        backbone: the model's layers.
        exits: layers below each exit, ascending.
        batch: where passes are counted.
        stopwatch: reads the clock.
        gate: keeps the final hidden state of every token that is run through all layers.

    Attributes:
        boundaries: layers below each exit, then the number of layers.
        planners: told how long passes take.
        cache: keys and values; set by `attach`.
        shared: numbers of sequences that took part in a pass with others; None: nobody reads it.
    """

    cache: SegmentCache

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[int],
        batch: BatchTrace,
        stopwatch: Stopwatch,
        gate: GateRunner | None = None,
    ) -> None:
        self.backbone = backbone
        self.gate = gate
        self.boundaries = (*exits, backbone.num_layers)
        self.batch = batch
        self.planners: tuple[DraftPlanner, ...] = ()
        self.shared: set[int] | None = None
        self._stopwatch = stopwatch
        self._prefilled: deque[float] = deque(maxlen=_LATEST)  # seconds of a token in a prefill
        self._pending: list[PendingStates] = []
        self._unseen: UnseenSlots | None = None  # where tokens of the mode "skip" were run

    def attach(self, cache: SegmentCache, max_pending: int) -> None:
        """Takes a cache whose rows are opened and closed; `max_pending` at an exit are expected."""
        self.cache = cache
        if self.gate is not None:
            self.gate.open(cache.batch)
        self._pending = [PendingStates(cache.batch, max_pending + 1) for _ in self.boundaries[1:]]

    def held(self, sequence: DecodingSequence) -> list[int]:
        """Tokens of a sequence that the layers of each segment hold, from the bottom."""
        return [self.cache.length(last - 1, sequence.row) for last in self.boundaries]

    def forget(self, sequence: DecodingSequence) -> None:
        """Drops what is kept of a sequence beside its keys and values."""
        self.clear_row(sequence.row)
        if sequence.lookup is not None:
            sequence.lookup.forget()

    def clear_row(self, row: int) -> None:
        """Drops what is pending in a row, and what the gate and unseen slots keep of it."""
        for pending in self._pending:
            pending.clear(row)
        if self._unseen is not None:
            self._unseen.clear(row)
        if self.gate is not None:
            self.gate.clear(row)

    def compact(self, active: Sequence[DecodingSequence]) -> None:
        """Frees the cache rows of all other sequences."""
        if len(active) == self.cache.batch or not active:
            return
        rows = [sequence.row for sequence in active]
        self.cache.keep(rows)
        for pending in self._pending:
            pending.keep(rows)
        if self.gate is not None:
            self.gate.keep(rows)
        if self._unseen is not None:
            self._unseen.keep(rows)
        self.backbone.contexts.keep_rows(rows)
        for row, sequence in enumerate(active):
            sequence.row = row

    def run(
        self,
        segment: int,
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
        *,
        through: int | None = None,
        counted: bool = True,
    ) -> Tensor:
        """One segment over ``hidden [R, M, d]`` (segment 0: token ids ``[R, 1]``).

        Args:
            through: the last of several segments that are run as one, with nothing pending between.
            counted: False for prompts, and for what is run again.
        """
        backbone = self.backbone
        through = segment if through is None else through
        first = self.boundaries[segment - 1] if segment else 0
        last = self.boundaries[through]
        ids = [sequence.row for sequence in rows]
        if self.shared is not None and len(rows) > 1:
            self.shared.update(sequence.index for sequence in rows)
        starts = [self.cache.length(first, row) for row in ids]
        holes = None
        if self._unseen is not None and any(one.settings.kv_mode is KVMode.SKIP for one in rows):
            holes = self._unseen.of(segment, ids, max(starts) + max(counts))
        began = self._stopwatch.work() if self.planners or not counted else 0.0
        ctx = backbone.pass_context(ids, starts, counts, batch=self.cache.batch, holes=holes)
        if segment == 0:
            hidden = backbone.embed(hidden, ctx)
        hidden = backbone.run_layers(hidden, first, last, ctx, self.cache)
        if last == backbone.num_layers:
            if self.gate is not None:
                self.gate.remember_rows(rows, hidden, counts, ctx)
            for place, sequence in enumerate(rows):
                if sequence.lookup is not None:
                    sequence.lookup.saw(starts[place], hidden[place, : counts[place]])
        tokens = max(counts)
        if not counted:
            done = sum(counts)
            if done >= _MANY and last - first == backbone.num_layers:
                self._prefilled.append((self._stopwatch.work() - began) / done)
            for one in range(segment, through + 1):
                self.batch.prefills.append(PassRecord(one, len(rows), tokens, max(starts) + tokens))
            return hidden
        if self.planners and through == segment:
            seconds = self._stopwatch.work() - began
            for planner in self.planners:
                planner.segment(segment, len(rows), len(rows) * tokens, seconds)
        self.note(segment, through, rows, counts, max(starts) + tokens)
        return hidden

    @property
    def token_seconds(self) -> float | None:
        """Seconds of one token in a pass of many through all layers, as prefills took lately."""
        return statistics.median(self._prefilled) if self._prefilled else None

    def _new_unseen(self, slots: int) -> UnseenSlots:
        rows, device = self.cache.batch, self.backbone.device
        return UnseenSlots(len(self.boundaries), rows, slots, device)

    def recompute(self, sequence: DecodingSequence) -> Tensor:
        """Runs all tokens of a sequence through all layers again; its last final state ``[1, d]``.

        For "longrope" at the length where its frequencies change, which the keys so far lack.
        """
        row, count = sequence.row, sequence.position + 1
        self.cache.crop(0, row)
        self.forget(sequence)
        # The prefix may begin with padding.
        tokens = sequence.ids(len(sequence.records))[-count:]
        ids = torch.tensor([tokens], device=self.backbone.device)
        full = len(self.boundaries) - 1
        return self.run(0, [sequence], ids, [count], through=full)[:, count - 1]

    def note(
        self,
        segment: int,
        through: int,
        rows: Sequence[DecodingSequence],
        counts: Sequence[int],
        keys: int,
    ) -> None:
        """Counts one pass of segments `segment`..`through`."""
        first = self.boundaries[segment - 1] if segment else 0
        last = self.boundaries[through]
        for one in range(segment, through + 1):
            self.batch.passes.append(PassRecord(one, len(rows), max(counts), keys))
        for layer in range(first, last):
            self.batch.layer_calls[layer] += 1
        for sequence, count in zip(rows, counts, strict=True):
            calls, positions = sequence.trace.layer_calls, sequence.trace.layer_positions
            for layer in range(first, last):
                calls[layer] += 1
                positions[layer] += count

    def note_steps(self, through: int, sequence: DecodingSequence, start: int, steps: int) -> None:
        """Counts so many passes of segments 0..`through` over one token each, positions `start`
        and on."""
        batch, trace = self.batch, sequence.trace
        for keys in range(start + 1, start + steps + 1):
            batch.passes.extend(PassRecord(one, 1, 1, keys) for one in range(through + 1))
        for layer in range(self.boundaries[through]):
            batch.layer_calls[layer] += steps
            trace.layer_calls[layer] += steps
            trace.layer_positions[layer] += steps

    def note_drafted(
        self, sequence: DecodingSequence, start: int, passes: Sequence[tuple[int, int]]
    ) -> None:
        """Counts passes through all layers, each over a token and drafts, the first from position
        `start` on.

        Args:
            passes: drafts of each, and how many of them were accepted.
        """
        batch, trace, segments = self.batch, sequence.trace, len(self.boundaries)
        positions = 0
        for drafted, accepted in passes:
            tokens = 1 + drafted
            keys, positions = start + tokens, positions + tokens
            batch.passes.extend(PassRecord(one, 1, tokens, keys) for one in range(segments))
            start += 1 + accepted
        for layer in range(self.boundaries[-1]):
            batch.layer_calls[layer] += len(passes)
            trace.layer_calls[layer] += len(passes)
            trace.layer_positions[layer] += positions

    def count_discarded(
        self, sequences: Sequence[DecodingSequence], *, final: bool = False
    ) -> None:
        """Counts layers that the executor ran speculatively and whose results were discarded."""
        for one in self.backbone.take_discarded(self.cache, final=final):
            layers = range(one.first, one.last)
            for layer in layers:
                self.batch.layer_calls[layer] += 1
            for sequence in sequences:
                if sequence.row in one.rows:
                    for layer in layers:
                        sequence.trace.layer_calls[layer] += 1
                        sequence.trace.layer_positions[layer] += 1

    def has_pending(self, k: int, rows: Sequence[DecodingSequence]) -> bool:
        """Whether any token of these sequences is pending at exit `k`."""
        return any(self._pending[k].count(sequence.row) for sequence in rows)

    def take_pending(self, k: int, rows: Sequence[DecodingSequence]) -> tuple[Tensor, list[int]]:
        """Removes and returns what is pending at exit `k`: states ``[R, M, d]`` and counts."""
        return self._pending[k].take([sequence.row for sequence in rows])

    def catch_up(self, sequences: Sequence[DecodingSequence]) -> None:
        """Runs everything that is pending through all layers above it."""
        for k, pending in enumerate(self._pending):
            rows = [sequence for sequence in sequences if pending.count(sequence.row)]
            if not rows:
                continue
            hidden, counts = self.take_pending(k, rows)
            hidden = self.run(k + 1, rows, hidden, counts)
            if k + 1 < len(self._pending):
                self.add_pending(k + 1, rows, hidden, counts)

    def add_pending(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Keeps the first ``counts`` states of ``hidden [R, M, d]`` as pending at exit `k`."""
        self._pending[k].append([sequence.row for sequence in rows], hidden, counts)
        pending = sum(map(PendingStates.total, self._pending))
        self.batch.peak_pending = max(self.batch.peak_pending, pending)

    def pending_at_first_exit(self, sequence: DecodingSequence) -> int:
        """Tokens of a sequence that are pending at the first exit."""
        return self._pending[0].count(sequence.row) if self._pending else 0

    def pass_by(
        self,
        k: int,
        exiting: Sequence[DecodingSequence],
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
    ) -> None:
        """Lossy KV modes: gives the layers above exit `k` what they get of tokens that exit there.

        Args:
            exiting: those of `rows` whose token exits and is not deferred.
            hidden: states at the exit, ``[R, M, d]``, of all of `rows`, theirs first.
        """
        copied = [one for one in exiting if one.settings.kv_mode is KVMode.PROPAGATE]
        if copied:
            # The token that exits is in the records already: the state is of the one before.
            starts = [sequence.position - 1 for sequence in copied]
            ids, ones = [sequence.row for sequence in copied], [1] * len(copied)
            ctx = self.backbone.pass_context(ids, starts, ones, batch=self.cache.batch)
            chosen = hidden[[rows.index(sequence) for sequence in copied], :1]
            above = self.boundaries[k], self.backbone.num_layers
            self.backbone.fill_layers(chosen, *above, ctx, self.cache)
            if self.gate is not None:
                self.gate.remember_rows(copied, chosen, ones, ctx)
        for sequence in exiting:
            if sequence.settings.kv_mode is KVMode.SKIP:
                self._skip_above(k, sequence, sequence.position - 1)

    def fill_above(self, k: int, sequence: DecodingSequence, hidden: Tensor, first: int) -> None:
        """As `pass_by`, for states ``[1, n, d]`` that are run again, positions `first` and on."""
        if sequence.settings.kv_mode is KVMode.PROPAGATE:
            rows, counts = [sequence.row], [hidden.shape[1]]
            ctx = self.backbone.pass_context(rows, [first], counts, batch=self.cache.batch)
            above = self.boundaries[k], self.backbone.num_layers
            self.backbone.fill_layers(hidden, *above, ctx, self.cache)
            if self.gate is not None:
                self.gate.remember_rows([sequence], hidden, counts, ctx)
            return
        for position in range(first, first + hidden.shape[1]):
            self._skip_above(k, sequence, position)

    def _skip_above(self, k: int, sequence: DecodingSequence, position: int) -> None:
        """Marks a position that the layers above exit `k` never see."""
        if self._unseen is None:
            self._unseen = self._new_unseen(position + 64)
        self.cache.skip(self.boundaries[k], sequence.row, position + 1)
        if self.gate is not None and sequence.gated:
            self.gate.skip(sequence.row, position + 1)
        self._unseen.mark(k + 1, sequence.row, position)

    def pending_tokens(self, sequence: DecodingSequence) -> int:
        """Tokens of a sequence that full depth lacks, its newest not counted."""
        return sequence.position - self.cache.length(self.backbone.num_layers - 1, sequence.row)

    def token_range(self, sequence: DecodingSequence, count: int) -> tuple[int, int]:
        """First and last index of the tokens that the last `count` final states predict."""
        held = self.cache.length(self.backbone.num_layers - 1, sequence.row)
        last = held - sequence.prompt_tokens
        return last - count + 1, last

    def position_range(self, sequence: DecodingSequence, count: int) -> range:
        """Positions of the last `count` tokens of a sequence that were run through all layers."""
        held = self.cache.length(self.backbone.num_layers - 1, sequence.row)
        return range(held - count, held)

    def roll_back(self, sequence: DecodingSequence, index: int) -> None:
        """Removes a rejected draft, all tokens after it, and their states in every layer."""
        sequence.roll_back(index)
        self.cache.crop(sequence.prompt_tokens + index, sequence.row)
        if self.gate is not None:
            self.gate.crop(sequence.prompt_tokens + index, sequence.row)
        for pending in self._pending:
            pending.clear(sequence.row)
