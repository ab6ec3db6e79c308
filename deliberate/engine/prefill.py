"""Prompts run in chunks, and sequences run again whose cache row was given away.

A sequence that is preempted keeps its tokens and loses its keys and values. They are made again by
the layers that made them: every layer runs a token's position as far as it had run it before, so
what was pending is pending again, and of a token that exited early in a lossy KV mode the layers
above the exit get what they got then. What follows is what would have followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.watched_rows import observe_prompt


class Refill:
    """How far each layer is to run a sequence's tokens before it decodes (on).

    Args:
        sequence: its drafts that were not verified are dropped.
        held: tokens that each segment's layers held, from the bottom; empty for a new sequence.

    Attributes:
        tokens: ids to run, from the prompt's first on: as many as the first segment is to hold.
        plain: how many of them from the first on go through all layers.
        drafts: of a new sequence: run in the pass of the last of its tokens.
    """

    def __init__(self, sequence: DecodingSequence, held: Sequence[int] = ()) -> None:
        ids = sequence.ids(len(sequence.records))[-(sequence.position + 1) :]
        if not held:
            self._held: list[int] | None = None
            self.tokens = ids[: sequence.prompt_tokens]
            self.plain = sequence.prompt_tokens
        else:
            fed = min(held[0], sequence.position) if sequence.exact else held[0]
            self._held = [fed if sequence.exact else min(one, fed) for one in held]
            self.tokens = ids[:fed]
            self.plain = self._plain(sequence)
        self.new = not held
        self.drafts: list[int] = []
        self._keys: list[int] = []

    def keys(self, block_size: int) -> list[int]:
        """What identifies each full block of tokens that go through all layers, for sharing."""
        if not self._keys:
            key = 0
            for end in range(block_size, self.plain, block_size):
                key = hash((key, *self.tokens[end - block_size : end]))
                self._keys.append(key)
        return self._keys

    def _plain(self, sequence: DecodingSequence) -> int:
        assert self._held is not None
        for position in range(sequence.prompt_tokens, self._held[-1]):
            if not sequence.defers and self.exit_layer(sequence, position) is not None:
                return position
        return self._held[-1]

    def exit_layer(self, sequence: DecodingSequence, position: int) -> int | None:
        """Layers below the exit that this position's state exited at, None at full depth."""
        index = position - sequence.prompt_tokens + 1  # of the token that was chosen there
        if not 0 < index < len(sequence.records):
            return None
        layer = sequence.records[index].exit_layer
        return layer if layer < sequence.trace.num_layers else None

    def held(self, segment: int) -> int:
        """Tokens that the layers of a segment are to hold."""
        return len(self.tokens) if self._held is None else self._held[segment]


class Chunk(NamedTuple):
    """Tokens of a sequence that are run in one step of a prefill.

    Attributes:
        refill: of the sequence.
        first, end: positions first..end-1.
        alone: in a pass of their own, as where nobody else is decoded.
    """

    sequence: DecodingSequence
    refill: Refill
    first: int
    end: int
    alone: bool = False

    @property
    def drafts(self) -> list[int]:
        """Those that are run with it: of the chunk that ends a prompt."""
        return self.refill.drafts if self.end == len(self.refill.tokens) else []

    @property
    def plain(self) -> list[int]:
        """Its tokens that go through all layers, and drafts."""
        tokens = self.refill.tokens[self.first : min(self.end, self.refill.plain)]
        return tokens + self.drafts if tokens else tokens


class Prefill:
    """Runs chunks of prompts and of what is run again.

    Args:
        runner: runs the segments.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner

    def last_of_chunk(
        self, refill: Refill, first: int, count: int, prompt: int, *, whole: bool = False
    ) -> int:
        """Where a chunk that should run tokens first..first+count-1 ends.

        Where rotary frequencies follow the length of the sequence, a prompt is one pass, and so is
        what is computed anew when they change.

        Args:
            whole: the prompt is one pass in any case.
        """
        backbone = self._runner.backbone
        end = min(first + count, len(refill.tokens))
        if whole and first < prompt:
            end = prompt
        if backbone.rope_follows_length and first == 0:
            switch = backbone.rope_switch
            crossed = switch is not None and prompt <= switch < len(refill.tokens)
            end = switch + 1 if crossed and switch is not None else prompt
        return end

    def run(self, chunks: Sequence[Chunk]) -> list[Tensor | None]:
        """Runs these, in rising rows.

        Returns:
            Of each the final states ``[1 + drafts, d]`` of the newest token that went through all
            layers, and of its drafts; None where there is none.
        """
        runner, full = self._runner, len(self._runner.boundaries) - 1
        states: list[Tensor | None] = [None] * len(chunks)
        plain = [
            (place, chunk, tokens) for place, chunk in enumerate(chunks) if (tokens := chunk.plain)
        ]
        passes = [[one] for one in plain if one[1].alone]
        passes.append([one for one in plain if not one[1].alone])
        for group in filter(None, passes):
            counts = [len(tokens) for _, _, tokens in group]
            padded = [tokens + [0] * (max(counts) - len(tokens)) for _, _, tokens in group]
            ids = torch.tensor(padded, device=runner.backbone.device)
            rows = [chunk.sequence for _, chunk, _ in group]
            hidden = runner.run(0, rows, ids, counts, through=full, counted=False)
            for row, (place, chunk, tokens) in enumerate(group):
                end = len(tokens)
                states[place] = hidden[row, end - 1 - len(chunk.drafts) : end]
                if chunk.sequence.watch is not None and chunk.refill.new:
                    observe_prompt(runner, chunk.sequence, hidden[row, :end], chunk.first)
        for sequence, refill, first, end, _ in chunks:
            first = max(first, refill.plain)
            if first < end:
                ids = torch.tensor([refill.tokens[first:end]], device=runner.backbone.device)
                self._again(0, sequence, refill, ids, first)
        return states

    def _again(
        self, k: int, sequence: DecodingSequence, refill: Refill, hidden: Tensor, first: int
    ) -> None:
        """Runs ``hidden [1, n, d]``, a sequence's positions first.., through segment `k` and up."""
        runner = self._runner
        count = hidden.shape[1]
        hidden = runner.run(k, [sequence], hidden, [count], counted=False)
        if k == len(runner.boundaries) - 1:
            return

        def goes(position: int) -> str:
            if position >= refill.held(k + 1):
                return "pending"
            lossy = not sequence.defers
            exits = lossy and refill.exit_layer(sequence, position) == runner.boundaries[k]
            return "exits" if exits else "on"

        for kind, group in itertools.groupby(range(first, first + count), goes):
            positions = list(group)
            part = hidden[:, positions[0] - first : positions[-1] - first + 1]
            if kind == "on":
                self._again(k + 1, sequence, refill, part, positions[0])
            elif kind == "pending":
                runner.add_pending(k, [sequence], part, [len(positions)])
            else:
                runner.fill_above(k, sequence, part, positions[0])
