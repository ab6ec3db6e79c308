"""The fused executor on CUDA: registry ops, one graph per segment, the decision left on the device.

`CudaFusedBackbone` runs passes of a few tokens through the ops of `deliberate.kernels` and replays
them as CUDA graphs over memory of fixed address. Prompts, slots that hold nothing ("skip") and
rotary embeddings that follow the length run as in `FusedBackbone`. On a CPU it is a `FusedBackbone`
unless told otherwise; with ``ops=True`` the same code runs there, by torch's references or under
Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deliberate.cache.attention_metadata import StepContext
from deliberate.cache.block_cache import BlockCache
from deliberate.cache.kv_cache import SegmentCache
from deliberate.config import KVStorage
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.cuda.block_cache import CudaBlockCache
from deliberate.executors.fused.cuda.block_passes import fill_blocks, run_blocks
from deliberate.executors.fused.cuda.graphs import Captures, Device, SegmentGraphs, device_for
from deliberate.executors.fused.cuda.layers import FillWeights, fill_listed, linear, run_listed
from deliberate.executors.fused.cuda.multi_step import CudaMultiStep
from deliberate.executors.fused.cuda.prefetch import (
    InFlight,
    LastPass,
    Launch,
    Prefetcher,
    give_up,
)
from deliberate.executors.fused.cuda.reader import CudaReader, HeadBuffers, LaterLogits
from deliberate.executors.fused.cuda.workspaces import (
    StackedCache,
    Step,
    Workspace,
    WorkspacePool,
    bucket,
)
from deliberate.executors.fused.implementation import LayerEngine
from deliberate.executors.fused.static_cache import HOLES
from deliberate.executors.fused.weights import LayerShape, LayerWeights, fingerprint
from deliberate.executors.quantization import Matrix, WeightPlan
from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm
from deliberate.kernels.registry import KERNELS
from deliberate.modeling.backbone import check_block_storage
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.modeling.head_output import HeadOutput

# Tokens of each row in one pass by the ops; longer ones (prompts) are bound by arithmetic.
MOST_OPS_TOKENS = 32


class CudaFusedBackbone(FusedBackbone):
    """`FusedBackbone` that decodes by the kernel registry's ops inside CUDA graphs.

    Args:
        model, boundaries, weights, head, share, engine: as for `FusedBackbone`.
        ops: run the ops: always, never, or (None) where the model is on a CUDA device.
        prefetch: launch the segment above an exit while the exit's result is copied to the host.
            A discarded segment is counted as run. Off by default: which is faster depends on how
            often tokens exit, and a cost model is measured without it.
        device: what captures, replays and copies; that of the model by default.

    Buffers of fixed address are written by one pass at a time: see `turn`. What is in flight
    between two passes, such as a segment that was launched early, is a cache's own.

    Attributes: those of `FusedBackbone`, and ``launches``, what was learned of early ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        boundaries: Sequence[int] = (),
        weights: str | Mapping[str, Sequence[int]] | WeightPlan | None = None,
        head: str | None = None,
        share: bool = True,
        engine: LayerEngine | str | None = None,
        ops: bool | None = None,
        prefetch: bool = False,
        device: Device | None = None,
    ) -> None:
        self.launches = Prefetcher(prefetch)
        self._ops = ops
        self._given_device = device
        self._captures: Captures | None = None
        self._pool = WorkspacePool(self._make_workspace)
        self._fill: tuple[Any, FillWeights] | None = None
        self._device_steps: CudaMultiStep | None = None
        self._head_buffers: dict[int, HeadBuffers] = {}
        super().__init__(
            model,
            boundaries=boundaries,
            weights=weights,
            head=head,
            share=share,
            engine=LayerEngine.EAGER if ops and engine is None else engine,
        )
        sizes = {(shape.heads, shape.kv_heads, shape.head_dim) for shape in self._shapes}
        self._alike = len(sizes) == 1  # one block of memory holds all layers

    # -- what runs -----------------------------------------------------------------------------

    @property
    def by_ops(self) -> bool:
        """Whether passes of a few tokens go through the ops."""
        wanted = self.device.type == "cuda" if self._ops is None else self._ops
        return wanted and self._alike and not self.contexts._rope_follows_length

    @property
    def how(self) -> str:
        """What runs the passes of a few tokens, in a phrase."""
        if not self.by_ops:
            return str(self.engine)
        choices = KERNELS.choices(self.device.type, self.dtype)
        names = ", ".join(sorted({backend for backend, _ in choices.values()}))
        reason = self.captures.reason
        return f"kernels by {names}, " + ("in CUDA graphs" if reason is None else reason)

    @property
    def serves_batches(self) -> bool:
        """Whether batches run as single sequences do, rather than by transformers' modules."""
        return self.by_ops

    @property
    def embedding(self) -> Tensor:
        """``[V, d]``."""
        return self._embed.weight.detach()

    @property
    def layer_weights(self) -> tuple[LayerWeights, ...]:
        """Joined, one per layer."""
        return self._weights

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """One per layer."""
        return self._shapes

    @property
    def captures(self) -> Captures:
        """What captures for this executor, and why it no longer does."""
        if self._captures is None:
            self._captures = Captures(self._given_device or device_for(self.device))
        return self._captures

    def refresh(self, *, same_modules: bool = False) -> bool:
        """As `FusedBackbone.refresh`; graphs over weights that moved are dropped."""
        changed = super().refresh(same_modules=same_modules)
        if self._fill is not None and self._fill[0] != fingerprint(self._watched):
            self._fill = None  # folded copies, which a weight written in place does not reach
        if changed:
            self._pool.clear()
            self._head_buffers.clear()
            self._device_steps = None
            self._captures = None
        return changed

    def turn(self) -> AbstractContextManager[Any]:
        """The lock of the buffers of fixed address: generations of several threads take turns."""
        return self._lock if self.by_ops else super().turn()

    def _settings(self) -> dict[str, Any]:
        """As `FusedBackbone._settings`."""
        own = {"ops": self._ops, "prefetch": self.launches.enabled, "device": self._given_device}
        return super()._settings() | own

    def new_cache(self, capacity: int = 0, batch: int = 1) -> SegmentCache:
        """An empty cache; where the ops run, in memory that graphs are kept for."""
        self.refresh()
        if not self.by_ops:
            return super().new_cache(capacity, batch)
        return StackedCache(self._shapes, capacity, batch, self._pool, InFlight(self.launches))

    def new_block_cache(self, blocks: int, **settings: Any) -> BlockCache:
        """As `Backbone.new_block_cache`; where the ops run, the memory of all blocks is taken now.

        Raises:
            DeliberateError: ``max_rows`` is not given, or keys and values are to be in 8 bits.
        """
        self.refresh()
        if not self.by_ops:
            return super().new_block_cache(blocks, **settings)
        check_block_storage(settings.pop("storage", KVStorage.NATIVE))
        graphs = SegmentGraphs(self.captures)
        return CudaBlockCache(self._shapes, self.gain, blocks, self._tables, graphs, **settings)

    # -- passes --------------------------------------------------------------------------------

    @torch.inference_mode()
    def run_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> Tensor:
        """As `Backbone.run_layers`.

        A pass that follows the question at its own exit, of the same rows at the same positions,
        goes on from the state that was asked about: what was run ahead for it is not run again.
        """
        q = ctx.positions.shape[1]
        if isinstance(cache, CudaBlockCache):
            return run_blocks(self, hidden, first, last, ctx, cache)
        if isinstance(cache, StackedCache):
            cache.flight.last_pass = None
        if first >= last or not self._takes(ctx, q, cache):
            give_up(cache)
            return super().run_layers(hidden, first, last, ctx, cache)
        assert isinstance(cache, StackedCache)
        cache.begin(ctx, first, last)
        rows, starts, counts = cache.pass_rows(ctx)
        cache.reserve(max(starts) + q)
        workspace = cache.workspace
        done = cache.flight.take(rows, starts, counts, first, last, cache.version)
        step = workspace.step(bucket(q))
        if done is None:
            step.put(first, hidden, rows)
            done = first
        if done < last:
            step.place(ctx.positions, rows, starts, counts)
            self.replay(workspace, step, done, last)
        cache.advance(ctx, first, last)
        cache.flight.last_pass = LastPass(rows, starts, last) if q == 1 else None
        return step.get(last, q, rows)

    @torch.inference_mode()
    def fill_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> None:
        """As `Backbone.fill_layers`: one launch for all layers."""
        give_up(cache)
        if isinstance(cache, CudaBlockCache):
            fill_blocks(self, hidden, first, last, ctx, cache)
            return
        if first >= last or hidden.shape[1] != 1 or not self._takes(ctx, 1, cache):
            super().fill_layers(hidden, first, last, ctx, cache)
            return
        assert isinstance(cache, StackedCache)
        cache.begin(ctx, first, last)
        rows, starts, counts = cache.pass_rows(ctx)
        cache.reserve(max(starts) + 1)
        workspace = cache.workspace
        step = workspace.step(1, "fill")
        step.place(ctx.positions, rows, starts, counts)
        step.put(first, hidden, rows)
        self.replay_fill(workspace, step, first, last)
        cache.advance(ctx, first, last)

    def replay(self, workspace: Workspace, step: Step, first: int, last: int) -> None:
        """Layers first..last-1 of the listed tokens: from one of the step's states to another."""
        source, state = step.state(first), step.state(last)
        weights, shapes = self._weights[first:last], self._shapes[first:last]

        def work() -> None:
            state.copy_(source)  # the exit's state stays: it may be evaluated or run again
            keys, values = workspace.keys[first:last], workspace.values[first:last]
            run_listed(
                state, weights, keys, values, shapes, workspace.cos, workspace.sin, step.listed,
                workspace.tables[first:last],
            )  # fmt: skip

        # A cache in blocks may outlive the weights that its graphs read.
        workspace.graphs.run(("layers", first, last, id(step), self.version), work)

    def replay_fill(self, workspace: Workspace, step: Step, first: int, last: int) -> None:
        """Keys and values of layers first..last-1 from the step's state at `first`."""
        state, weights, shape = step.state(first), self._fill_weights(first), self._shapes[first]

        def work() -> None:
            keys, values = workspace.keys[first:last], workspace.values[first:last]
            fill_listed(
                state, weights, first, last, keys, values, shape,
                workspace.cos, workspace.sin, step.listed,
            )  # fmt: skip

        # The weights themselves, not their address: a graph for others that had it must not serve.
        workspace.graphs.run(("fill", first, last, weights), work)

    def take_discarded(self, cache: SegmentCache, *, final: bool = False) -> list[Launch]:
        """Discarded launches of a cache since the last call, for a count of layers.

        Args:
            final: no pass follows, so that a launch that is still open is discarded too.
        """
        if not isinstance(cache, StackedCache):
            return []
        if final:
            cache.flight.give_up()
        return cache.flight.take_discarded()

    # -- heads ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """As `FusedBackbone.logits`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if not self.by_ops or len(flat) > MOST_OPS_TOKENS or self.differentiates(hidden):
            return super().logits(hidden)
        buffers = self._buffers_for(len(flat))
        normed, out = (
            buffers.buffer("normed", self.hidden_size),
            buffers.buffer("logits", self.vocab_size),
        )

        def work() -> None:
            add_rmsnorm(buffers.hidden, None, self.gain, self.eps, normed)
            out.copy_(linear(normed, self.head))

        buffers.put(flat)
        buffers.graphs.run("logits", work)
        return out[: len(flat)].clone().view(*hidden.shape[:-1], -1)

    @torch.inference_mode()
    def read_full_depth(self, hidden: Tensor) -> HeadOutput:
        """As `Backbone.read_full_depth`, without logits unless they are asked for."""
        if not self.by_ops or len(hidden) > MOST_OPS_TOKENS:
            return super().read_full_depth(hidden)
        buffers, head = self._buffers_for(len(hidden)), self.head
        assert isinstance(head, Matrix)

        def work() -> None:
            buffers.read(self.gain, self.eps, head)
            buffers.note()

        buffers.put(hidden)
        buffers.graphs.run("top", work)
        probabilities, tokens = buffers.packed[:2, : len(hidden)].tolist()
        return LaterLogits(hidden, [int(token) for token in tokens], probabilities, self.logits)

    def multi_step(self, reader: ExitReader | None) -> Any:
        """As `Backbone.multi_step`: steps whose token and position stay on the device."""
        if not self.by_ops:
            return super().multi_step(reader)
        if isinstance(reader, CudaReader):
            if reader.steps is None:
                reader.steps = CudaMultiStep(self, reader)
            return reader.steps
        if self._device_steps is None:
            self._device_steps = CudaMultiStep(self, None)
        return self._device_steps

    def exit_reader(self, heads: ExitHeads, **settings: Any) -> CudaReader:
        """A reader of these exits through this executor; settings as for `ExitReader`."""
        self.refresh()
        return CudaReader(heads, self, **settings)

    # -- parts ---------------------------------------------------------------------------------

    def _takes(self, ctx: StepContext, q: int, cache: SegmentCache) -> bool:
        return isinstance(cache, StackedCache) and self.few(ctx, q)

    def few(self, ctx: StepContext, q: int) -> bool:
        """Whether a pass over q tokens a row goes through the ops."""
        return self.by_ops and q <= MOST_OPS_TOKENS and ctx.masks[HOLES] is None

    def _buffers_for(self, rows: int) -> HeadBuffers:
        size = bucket(rows)
        if size not in self._head_buffers:
            self._head_buffers[size] = HeadBuffers(size, self.gain, SegmentGraphs(self.captures))
        return self._head_buffers[size]

    def _make_workspace(self, rows: int, capacity: int) -> Workspace:
        graphs = SegmentGraphs(self.captures)
        return Workspace(self._shapes, self.gain, rows, capacity, self._tables, graphs)

    def _tables(self, size: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(size, device=self.device)[None]
        cos, sin = self._rotary(self.gain, positions)
        return cos[0], sin[0]

    def _fill_weights(self, first: int) -> FillWeights:
        """Folded once, from the first exit on."""
        if self._fill is None or self._fill[1].start > first:
            start = min((first, *self.boundaries[:-1]))
            with torch.inference_mode(False), torch.no_grad():
                made = FillWeights.of(self._weights, self._shapes, start, self.dtype)
            self._fill = fingerprint(self._watched), made
        return self._fill[1]
