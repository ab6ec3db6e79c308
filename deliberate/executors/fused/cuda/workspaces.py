"""Key/value memory of fixed address for captured graphs, leased to one generation after another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.cache.attention_metadata import StepContext
from deliberate.cache.kv_cache import SegmentCache
from deliberate.executors.fused.cuda.graphs import SegmentGraphs
from deliberate.executors.fused.cuda.layers import Listed
from deliberate.executors.fused.cuda.prefetch import InFlight
from deliberate.executors.fused.static_cache import StaticCache
from deliberate.executors.fused.weights import LayerShape

# Least tokens of a workspace: generations of about the same length then share one, and its graphs.
LEAST_CAPACITY = 256
# Workspaces kept per batch bucket once nobody uses them.
MOST_KEPT = 2

# Rotary tables (cos, sin), each ``[n, D]``, for positions 0..n-1.
Tables = Callable[[int], tuple[Tensor, Tensor]]


def bucket(count: int) -> int:
    """The smallest power of two that is at least `count`: sizes for which graphs are made."""
    return 1 << max(count - 1, 0).bit_length()


class Step:
    """Inputs and outputs of passes over `tokens` tokens of every row; T = rows * tokens.

    Attributes:
        listed: who takes part.
    """

    def __init__(self, rows: int, tokens: int, like: Tensor) -> None:
        """``like``: any tensor of the device and dtype of hidden states, last dimension d."""
        total, device = rows * tokens, like.device
        order = torch.arange(total, dtype=torch.int32, device=device)
        zero = torch.zeros(total, dtype=torch.int32, device=device)
        count = torch.full((1,), total, dtype=torch.int32, device=device)
        self.listed = Listed(zero, zero + 1, order, count, tokens)
        self._rows, self._like = rows, like
        self._states: dict[int, Tensor] = {}
        self._who: tuple[int, ...] | None = None  # listed by the host; None: by the device
        self._where: object = None

    def state(self, boundary: int) -> Tensor:
        """States ``[T, d]`` after so many layers; a pass reads one of these and writes another."""
        if boundary not in self._states:
            # Ordinary tensors: graphs are captured under inference mode and replayed outside it.
            with torch.inference_mode(False):
                shape = (self._rows * self.listed.tokens, self._like.shape[-1])
                self._states[boundary] = self._like.new_zeros(shape)
        return self._states[boundary]

    def place(
        self,
        positions: Tensor,
        row_ids: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Lists the first ``counts[i]`` tokens of rows ``row_ids[i]``, at their positions.

        Args:
            positions: int64 ``[1 or R, q]`` on the device: those of the host's ``starts``.
        """
        tokens = self.listed.tokens
        where = (tuple(row_ids), tuple(starts), positions.shape[1])
        if where != self._where:
            wide = self.listed.positions.view(self._rows, tokens)[:, : positions.shape[1]]
            if tuple(row_ids) == tuple(range(len(row_ids))):
                wide[: len(row_ids)] = positions
            else:
                wide[self._index(row_ids)] = positions.expand(len(row_ids), -1).to(torch.int32)
            torch.add(self.listed.positions, 1, out=self.listed.lengths)
            self._where = where
        who = tuple(
            row * tokens + token
            for row, count in zip(row_ids, counts, strict=True)
            for token in range(count)
        )
        if who != self._who:
            own = torch.tensor(who, dtype=torch.int32)
            self.listed.rows[: len(who)].copy_(own)
            self.listed.count.fill_(len(who))
            self._who = who

    def take_list(self, rows: Tensor, count: Tensor) -> None:
        """Lists ``rows[:count]``, which the device made and the host has not seen."""
        self.listed.rows[: len(rows)].copy_(rows)
        self.listed.count.copy_(count)
        self._who = None

    def put(self, boundary: int, hidden: Tensor, row_ids: Sequence[int]) -> None:
        """Takes ``hidden [R, q, d]`` of these rows as the states at a boundary."""
        held = self._by_row(boundary)[:, : hidden.shape[1]]
        if tuple(row_ids) == tuple(range(len(row_ids))):
            held[: len(row_ids)] = hidden
        else:
            held[self._index(row_ids)] = hidden

    def get(self, boundary: int, q: int, row_ids: Sequence[int]) -> Tensor:
        """A copy of the states ``[R, q, d]`` of these rows: the next pass writes over its own."""
        held = self._by_row(boundary)[:, :q]
        if tuple(row_ids) == tuple(range(len(row_ids))):
            return held[: len(row_ids)].clone()
        return held[self._index(row_ids)]

    def _by_row(self, boundary: int) -> Tensor:
        return self.state(boundary).view(self._rows, self.listed.tokens, -1)

    def _index(self, row_ids: Sequence[int]) -> Tensor:
        return torch.tensor(row_ids, device=self._like.device)


class Workspace:
    """Memory and graphs for batches of up to `rows` sequences of up to `capacity` tokens.

    Attributes:
        keys, values: of each layer ``[rows, kv_heads, capacity, D]``.
        tables: of each layer: none, a sequence is a row.
        cos, sin: rotary tables ``[capacity, D]``.
        graphs: of passes over this memory.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        like: Tensor,
        rows: int,
        capacity: int,
        tables: Tables,
        graphs: SegmentGraphs,
    ) -> None:
        shape = shapes[0]
        with torch.inference_mode(False), torch.no_grad():
            size = (len(shapes), rows, shape.kv_heads, capacity, shape.head_dim)
            self.keys: Any = like.new_zeros(size)
            self.values: Any = like.new_zeros(size)
            self.cos, self.sin = (part.contiguous() for part in tables(capacity))
        self.tables: Sequence[Tensor | None] = [None] * len(shapes)
        self._begin(rows, capacity, like, graphs)

    def _begin(self, rows: int, capacity: int, like: Tensor, graphs: SegmentGraphs) -> None:
        self.rows, self.capacity = rows, capacity
        self.graphs = graphs
        self._like = like
        self._steps: dict[object, Step] = {}

    def step(self, tokens: int, purpose: str = "layers") -> Step:
        """The buffers of passes over so many tokens; another purpose has others."""
        key = (tokens, purpose)
        if key not in self._steps:
            with torch.inference_mode(False):
                self._steps[key] = Step(self.rows, tokens, self._like)
        return self._steps[key]


class WorkspacePool:
    """Workspaces by batch bucket; one is leased again when the cache that used it is gone.

    Args:
        make: (rows, capacity) -> a new workspace.
    """

    def __init__(self, make: Callable[[int, int], Workspace]) -> None:
        self._make = make
        self._kept: dict[int, list[tuple[Workspace, weakref.ref[object]]]] = {}

    def lease(self, user: object, batch: int, capacity: int) -> Workspace:
        """One with room for these, its memory zeroed, until `user` is collected."""
        rows, room = bucket(batch), bucket(max(capacity, LEAST_CAPACITY))
        kept = self._kept.setdefault(rows, [])
        if len(kept) >= MOST_KEPT and all(entry[1]() is not None for entry in kept):
            # A finished generation may be a cycle that nobody has collected yet; its memory and
            # graphs are worth more than the time that takes.
            gc.collect()
        free = [entry for entry in kept if entry[1]() is None]
        fitting = [workspace for workspace, _ in free if workspace.capacity >= room]
        # What is too short now was outgrown; of what is free, keep no more than a few.
        gone = [entry for entry in free if entry[0] not in fitting[:MOST_KEPT]]
        kept[:] = [entry for entry in kept if entry not in gone]
        if fitting:
            found = min(fitting[:MOST_KEPT], key=lambda workspace: workspace.capacity)
            kept[:] = [entry for entry in kept if entry[0] is not found]
            # A generation that failed may have written NaN there.
            found.keys.zero_()
            found.values.zero_()
        else:
            found = self._make(rows, room)
        kept.append((found, weakref.ref(user)))
        return found

    def clear(self) -> None:
        """Forgets all: the weights that their graphs read have moved."""
        self._kept.clear()


class StackedCache(StaticCache):
    """A `StaticCache` in a workspace's memory, which it borrows when first written.

    Attributes:
        version: changes when rows are renumbered or tokens forgotten.
        flight: what was launched early of it.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        capacity: int,
        batch: int,
        pool: WorkspacePool,
        flight: InFlight,
    ) -> None:
        SegmentCache.__init__(self, len(shapes), capacity, batch)
        self.version = 0
        self.flight = flight
        self._pool = pool
        self._workspace: Workspace | None = None

    @property
    def workspace(self) -> Workspace:
        """The memory; borrowed now if it was not yet."""
        if self._workspace is None:
            self._borrow(self._initial_capacity)
        assert self._workspace is not None
        return self._workspace

    def reserve(self, tokens: int) -> None:
        """As `StaticCache.reserve`."""
        if tokens >= self._capacities[0]:
            self._borrow(max(tokens + 1, self._initial_capacity))

    def pass_rows(
        self, ctx: StepContext
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Rows of a pass, where each begins and how many tokens it has."""
        if ctx.ragged:
            return ctx.row_ids, ctx.starts, ctx.counts
        q = ctx.positions.shape[1]
        return tuple(range(self.batch)), (ctx.start,) * self.batch, (q,) * self.batch

    def crop(self, length: int, row: int | None = None) -> None:
        """As `SegmentCache.crop`."""
        self.version += 1
        super().crop(length, row)

    def keep(self, rows: Sequence[int]) -> None:
        """As `SegmentCache.keep`, within the same memory, so that its graphs serve on."""
        if list(rows) == list(range(self._batch)):
            return
        self.version += 1
        self._batch = len(rows)
        self._lengths = [[held[row] for row in rows] for held in self._lengths]
        self._ragged = None
        if self._workspace is not None:
            index = torch.tensor(list(rows), device=self._workspace.keys.device)
            with torch.inference_mode(False), torch.no_grad():
                for whole in (self._workspace.keys, self._workspace.values):
                    for layer in whole:  # one at a time: the copy in between is one layer's
                        layer[: len(rows)] = layer.index_select(0, index)
            self._look_at(self._workspace)

    def _grow(self, layer: int, needed: int, key_states: Tensor, value_states: Tensor) -> None:
        self._borrow(needed)

    def _borrow(self, tokens: int) -> None:
        old = self._workspace
        new = self._pool.lease(self, self._batch, tokens)
        if old is not None:
            with torch.inference_mode(False), torch.no_grad():
                new.keys[:, : self._batch, :, : old.capacity] = old.keys[:, : self._batch]
                new.values[:, : self._batch, :, : old.capacity] = old.values[:, : self._batch]
        self._look_at(new)

    def _look_at(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._keys = [layer[: self._batch] for layer in workspace.keys]
        self._values = [layer[: self._batch] for layer in workspace.values]
        self._capacities = [workspace.capacity] * self.num_layers
