"""Rows of one cache beside the same sequences alone, each with a cache of its own."""

from __future__ import annotations

import torch
from tiny_models import VOCAB
from torch import Tensor

from deliberate.cache.block_cache import BlockCache
from deliberate.modeling.backbone import Backbone

SEGMENTS = ((0, 1), (1, 3), (3, 4))


class Side:
    """One cache, and the states that are pending above each segment of its rows."""

    def __init__(self, backbone: Backbone, cache) -> None:
        self.backbone, self.cache = backbone, cache
        self.pending: dict[tuple[int, int], Tensor] = {}

    def run(self, segment: int, last: int, rows: list[int], inputs: list[Tensor]) -> list[Tensor]:
        """Runs segments segment..last of some rows in one pass; states after it, by row."""
        first, end = SEGMENTS[segment][0], SEGMENTS[last][1]
        starts = [self.cache.length(first, row) for row in rows]
        counts = [one.shape[1] for one in inputs]
        ctx = self.backbone.pass_context(rows, starts, counts, batch=self.cache.batch)
        q = max(counts)
        padded = [
            torch.cat([one, one.new_zeros((1, q - one.shape[1], *one.shape[2:]))], dim=1)
            for one in inputs
        ]
        hidden = torch.cat(padded)
        if segment == 0:
            hidden = self.backbone.embed(hidden, ctx)
        hidden = self.backbone.run_layers(hidden, first, end, ctx, self.cache)
        self.cache.check()
        return [hidden[i : i + 1, :count].clone() for i, count in enumerate(counts)]


class Comparison:
    """The same passes through a `BlockCache` and through a cache of each sequence's own.

    Args:
        equal: how states must agree.
    """

    def __init__(self, backbone: Backbone, cache: BlockCache, equal) -> None:
        self.backbone, self.equal = backbone, equal
        self.block = Side(backbone, cache)
        self.solo: dict[int, Side] = {}
        self.texts: dict[int, list[int]] = {}

    @property
    def cache(self) -> BlockCache:
        return self.block.cache

    def open(self, prompt: list[int]) -> int:
        """Opens a row; alone, what it holds from the start is run."""
        row = self.cache.open_row(0, prompt)
        self._solo(row, prompt)
        held = self.cache.length(0, row)
        if held:
            self.solo[row].run(0, 2, [0], [torch.tensor([prompt[:held]])])
        return row

    def fork(self, row: int) -> int:
        new = self.cache.fork_row(row)
        lengths = self.cache.row_lengths(row)
        self._solo(new, self.texts[row][: lengths[0]])
        inputs = torch.tensor([self.texts[new]])
        for segment, (first, _) in enumerate(SEGMENTS):
            if lengths[first]:
                (made,) = self.solo[new].run(segment, segment, [0], [inputs[:, : lengths[first]]])
                inputs = made
                if segment + 1 < len(SEGMENTS):
                    above = lengths[SEGMENTS[segment + 1][0]]
                    self.solo[new].pending[0, segment + 1] = made[:, above:]
        for segment in (1, 2):
            if (row, segment) in self.block.pending:
                self.block.pending[new, segment] = self.block.pending[row, segment]
        return new

    def _solo(self, row: int, text: list[int]) -> None:
        self.solo[row] = Side(self.backbone, self.backbone.new_cache())
        self.texts[row] = list(text)

    def new(self, counts: dict[int, int], last: int = 0, tokens=None) -> None:
        """New tokens of some rows through segments 0..last: of the text, then random ones."""
        rows, inputs = sorted(counts), []
        for row in rows:
            start = self.cache.length(0, row)
            text, end = self.texts[row], start + counts[row]
            more = tokens[row] if tokens else torch.randint(VOCAB, (counts[row],)).tolist()
            text += more[: max(0, end - len(text))]
            inputs.append(torch.tensor([text[start:end]]))
        self._pass(0, last, rows, inputs, inputs)

    def deepen(self, segment: int, rows: list[int], most: int = 1000) -> None:
        """All that is pending below a segment, or the first `most` of each row."""
        ready = [r for r in sorted(rows) if self._count(r, segment)]
        if not ready:
            return
        block, solo = [], []
        for row in ready:
            pending = self.block.pending[row, segment]
            block.append(pending[:, :most])
            self.block.pending[row, segment] = pending[:, most:]
            pending = self.solo[row].pending[0, segment]
            solo.append(pending[:, :most])
            self.solo[row].pending[0, segment] = pending[:, most:]
        self._pass(segment, segment, ready, block, solo)

    def _count(self, row: int, segment: int) -> int:
        pending = self.block.pending.get((row, segment))
        return 0 if pending is None else pending.shape[1]

    def _pass(self, segment, last, rows, block_inputs, solo_inputs) -> None:
        made = self.block.run(segment, last, rows, block_inputs)
        for row, mine, given in zip(rows, made, solo_inputs, strict=True):
            (theirs,) = self.solo[row].run(segment, last, [0], [given])
            assert self.equal(mine, theirs), (segment, row)
            if last + 1 < len(SEGMENTS):
                _append(self.block.pending, (row, last + 1), mine)
                _append(self.solo[row].pending, (0, last + 1), theirs)

    def crop(self, row: int, length: int) -> None:
        """Rolls back to `length` tokens; pending states must end before or at it."""
        self.cache.crop(length, row)
        self.solo[row].cache.crop(length)
        del self.texts[row][length:]
        for side, key in ((self.block, row), (self.solo[row], 0)):
            for segment in (1, 2):
                pending = side.pending.get((key, segment))
                if pending is not None:
                    held = side.cache.length(SEGMENTS[segment][0], key)
                    side.pending[key, segment] = pending[:, : max(0, length - held)]

    def close(self, row: int) -> None:
        self.cache.close_row(row)
        for segment in (1, 2):
            self.block.pending.pop((row, segment), None)
        del self.solo[row], self.texts[row]

    def check_states(self) -> None:
        """Every key and value that a row still needs is what it is alone."""
        for row, side in self.solo.items():
            for layer, window in enumerate(self.backbone.windows):
                held, top = self.cache.length(layer, row), self.cache.row_lengths(row)[-1]
                assert held == side.cache.length(layer)
                first = max(0, top - window + 1) if window else 0
                if held <= first:
                    continue
                mine = self.cache.states(layer, row)
                for ours, theirs in zip(mine, side.cache.states(layer), strict=True):
                    assert self.equal(ours[:, :, first:held], theirs[:, :, first:held])


def _append(pending: dict, key, states: Tensor) -> None:
    held = pending.get(key)
    pending[key] = states if held is None else torch.cat([held, states], dim=1)


def arbitrary_life(comparison: Comparison, seed: int, steps: int = 30) -> None:
    """Rows are opened with few prompts, run unevenly, forked, rolled back and closed at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    torch.manual_seed(seed)
    prompts = [torch.randint(VOCAB, (30,)).tolist() for _ in range(2)]
    cache = comparison.cache
    for _ in range(steps):
        rows = sorted(comparison.texts)
        kind = draw(10)
        if len(rows) < 2 or (kind == 0 and len(rows) < 5):
            text = prompts[draw(2)][: 3 + draw(27)]
            row = comparison.open(text)
            comparison.new({row: len(text) - cache.length(0, row)}, last=2)
        elif kind == 1 and len(rows) < 5:
            comparison.fork(rows[draw(len(rows))])
        elif kind == 2:
            comparison.close(rows[draw(len(rows))])
        elif kind == 3:
            row = rows[draw(len(rows))]
            top, bottom = cache.row_lengths(row)[-1], cache.length(0, row)
            comparison.crop(row, top + draw(bottom - top + 1))
        elif kind < 7:
            chosen = [row for row in rows if draw(3)] or rows
            comparison.new({row: 1 + draw(6) for row in chosen})
        else:
            chosen = [row for row in rows if draw(3)] or rows
            most = (1000, 2)[draw(2)]
            comparison.deepen(1, chosen, most)
            comparison.deepen(2, chosen)
    comparison.check_states()
    for row in list(comparison.texts):
        comparison.close(row)
    cache.check()
    assert cache.free_blocks == cache.tables.allocators[0].limit
