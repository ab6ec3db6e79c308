"""A draft layer on CUDA: a call of the layer is one graph, and so is a reading of its head.

Operator by operator a draft is some forty launches of a few microseconds of work each; six of them
took longer than the pass of SmolLM2 that verifies them (docs/performance.md). Here the layer runs
by the same ops as the model's own layers, over the rows of its own keys and values, and the host
waits only for the token that each reading gives. On a CPU the same code runs by torch's references.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.executors.draft_cache import DraftRows
from deliberate.executors.fused.cuda.graphs import SegmentGraphs
from deliberate.executors.fused.cuda.layers import run_listed
from deliberate.executors.fused.cuda.reader import MOST_READ_ROWS, HeadBuffers
from deliberate.executors.fused.cuda.workspaces import Tables, Workspace, bucket
from deliberate.executors.fused.weights import LayerShape, LayerWeights
from deliberate.executors.quantization import Matrix
from deliberate.modeling.draft_layer import DraftLayer, rms_norm

# Entries of a sequence in one graph; more, as at a prompt's end, are bound by arithmetic.
MOST_ENTRIES = 8


class DraftWorkspace(Workspace):
    """Buffers and graphs of passes over the rows of a draft layer.

    Attributes:
        tokens: int64 ``[rows, q]`` by q: the token of every entry that is fed.
    """

    def __init__(
        self, rows: DraftRows, like: Tensor, rotary: Tables, graphs: SegmentGraphs
    ) -> None:
        self.keys: Any = [rows.keys]
        self.values: Any = [rows.values]
        self.tables = [None]
        count, _, capacity, _ = rows.keys.shape
        with torch.inference_mode(False), torch.no_grad():
            self.cos, self.sin = (part.contiguous() for part in rotary(capacity))
        self._begin(count, capacity, like, graphs)
        self._tokens: dict[int, Tensor] = {}

    def tokens(self, q: int) -> Tensor:
        """Where passes over q entries of every row read their tokens."""
        if q not in self._tokens:
            with torch.inference_mode(False):
                size = (self.rows, q)
                self._tokens[q] = torch.zeros(size, dtype=torch.int64, device=self._like.device)
        return self._tokens[q]


class CudaDraftPasses:
    """One draft layer by the ops of an executor, in its graphs.

    Args:
        layer: the weights, of the dtype and on the device of the states.
        backbone: a `CudaFusedBackbone` that runs by ops.
        head: rows of its head ``[vocabulary, d]`` that can be drafted.
    """

    def __init__(self, layer: DraftLayer, backbone: Any, head: Tensor) -> None:
        config = layer.config
        self._layer, self._backbone = layer, backbone
        self._head = Matrix(head)
        self._weights = LayerWeights(
            layer.attention_norm.detach(), Matrix(layer.qkv.detach()), None, None, None,
            Matrix(layer.out.detach()), None, layer.mlp_norm.detach(),
            Matrix(layer.gate_up.detach()), None, Matrix(layer.down.detach()), None,
        )  # fmt: skip
        self._shape = LayerShape(
            config.heads, config.kv_heads, config.head_dim, config.head_dim**-0.5,
            config.eps, config.eps, None,
        )  # fmt: skip
        # Of each place of keys and values; it grows, and is then another workspace's.
        self._workspaces: weakref.WeakKeyDictionary[DraftRows, tuple[Tensor, DraftWorkspace]] = (
            weakref.WeakKeyDictionary()
        )
        self._head_buffers: dict[int, HeadBuffers] = {}

    @staticmethod
    def takes(counts: Sequence[int]) -> bool:
        """Whether a call over so many entries of each sequence is one graph."""
        return max(counts) <= MOST_ENTRIES

    def extend(
        self,
        rows: DraftRows,
        indexes: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        tokens: Sequence[Sequence[int]],
        states: Tensor,
    ) -> Tensor:
        """Writes entries of several sequences; their outputs ``[n, d]``.

        Args:
            indexes: rows, each with room for its entries.
            starts, counts: where each begins and how many it has.
            tokens: of each entry. states: ``[n, d]``, one sequence's after another's.
        """
        workspace = self._workspace(rows)
        q = bucket(max(counts))
        step, fed = workspace.step(q, "drafts"), workspace.tokens(q)
        padded = [[*own, *[0] * (q - len(own))] for own in tokens]
        device = states.device
        which = torch.tensor(list(indexes), device=device)
        fed[which] = torch.tensor(padded, device=device)
        positions = torch.tensor(list(starts), device=device)[:, None]
        step.place(positions + torch.arange(q, device=device), indexes, starts, counts)
        parts = list(states.split(list(counts)))
        step.put(0, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), indexes)
        source, state, listed = step.state(0), step.state(1), step.listed
        layer, backbone = self._layer, self._backbone

        def work() -> None:
            embedded = F.embedding(fed.flatten(), backbone.embedding)
            state.copy_(layer.join(embedded, rms_norm(source, backbone.gain, backbone.eps)))
            run_listed(
                state, [self._weights], workspace.keys, workspace.values, [self._shape],
                workspace.cos, workspace.sin, listed,
            )  # fmt: skip

        workspace.graphs.run(("drafts", q), work)
        outputs = step.get(1, q, indexes)
        return torch.cat([own[:count] for own, count in zip(outputs, counts, strict=True)])

    def read(self, outputs: Tensor) -> tuple[list[int], list[float]]:
        """Index in the draft vocabulary and probability of the best token of each ``[R, d]``."""
        places: list[int] = []
        scores: list[float] = []
        for part in outputs.split(MOST_READ_ROWS):
            buffers = self._buffers_for(len(part))

            def work(buffers: HeadBuffers = buffers) -> None:
                buffers.read(self._backbone.gain, self._backbone.eps, self._head)
                buffers.note()

            buffers.put(part)
            buffers.graphs.run("drafts", work)
            best, own = buffers.packed[:2, : len(part)].tolist()
            scores += best
            places += [int(one) for one in own]
        return places, scores

    def _workspace(self, rows: DraftRows) -> DraftWorkspace:
        held = self._workspaces.get(rows)
        if held is None or held[0] is not rows.keys:
            graphs = SegmentGraphs(self._backbone.captures)
            made = DraftWorkspace(rows, self._backbone.gain, self._tables, graphs)
            held = self._workspaces[rows] = rows.keys, made
        return held[1]

    def _tables(self, size: int) -> tuple[Tensor, Tensor]:
        like = self._backbone.gain
        cos, sin = self._layer.rotary(torch.arange(size, device=like.device))
        return cos.to(like.dtype), sin.to(like.dtype)

    def _buffers_for(self, rows: int) -> HeadBuffers:
        size = bucket(rows)
        if size not in self._head_buffers:
            graphs = SegmentGraphs(self._backbone.captures)
            self._head_buffers[size] = HeadBuffers(size, self._backbone.gain, graphs)
        return self._head_buffers[size]
