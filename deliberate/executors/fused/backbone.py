"""Fused executor for the Llama family: joined weights, static cache, compiled layers.

`FusedBackbone` is a `Backbone` that runs the layers of Llama, Mistral, Qwen2 and Qwen3 models by
its own functions instead of transformers' modules. On a CPU one token of a small model costs
mostly the dispatch of some thirty operators a layer; here a run of layers is one call: of the C++
kernels in float32, of a graph compiled by torch in other dtypes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deliberate.cache.attention_metadata import StepContext
from deliberate.cache.block_cache import BlockCache
from deliberate.cache.kv_cache import SegmentCache
from deliberate.executors.fused.compiled import MOST_TOKENS, CompiledLayers
from deliberate.executors.fused.implementation import LayerEngine, as_engine, choose_engine
from deliberate.executors.fused.native import NativeCache, NativeHead, NativeLayers, NativeMultiStep
from deliberate.executors.fused.native_blocks import NativeBlockCache
from deliberate.executors.fused.ops import fill_block, run_block
from deliberate.executors.fused.programs import Programs
from deliberate.executors.fused.reader import FusedReader, Score, read_head
from deliberate.executors.fused.static_cache import (
    HOLES,
    SLOT_MULTIPLE,
    SLOTS,
    Int8StaticCache,
    SlotContexts,
    StaticCache,
)
from deliberate.executors.fused.structure import ModelStructure
from deliberate.executors.fused.weights import (
    LayerWeights,
    fingerprint,
    fuse_layers,
    layer_shapes,
    places,
    plan_for,
    stored,
    unsupported,
    watched,
)
from deliberate.executors.quantization import FEW_ROWS, Matrix, Stored, WeightPlan, product
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.modeling.head_output import HeadOutput
from deliberate.modeling.measures import MAX_PROB
from deliberate.utils.errors import DeliberateError


class FusedBackbone(Backbone):
    """The Llama family with joined weights; for inference only.

    With the C++ kernels every pass is one call, of whatever sequences its tokens are, and what a
    token gets depends on nothing else in its pass. Under torch.compile one sequence is decoded by
    compiled functions, batches by the same functions run eagerly: no new size waits for the
    compiler. Outputs equal those of `Backbone` up to rounding.

    Args:
        model: a model that `deliberate.executors.fused.weights.unsupported` has nothing against.
        boundaries: exit layers: where passes begin and end.
        weights, head: storage of the layers and of the head, see `WeightPlan.build`.
        share: let the model's own parameters become views of the joined weights. Without it the
            weights of all layers are held twice.
        engine: native, inductor or eager; None takes the first of these that can be had here.

    Threads may decode with it at once: what a pass writes belongs to its cache.

    Attributes: those of `Backbone`, and ``plan``, ``engine``, ``programs``, ``version`` (counts how
    often weights were taken up), and of the head: ``gain`` and ``eps`` of the final norm, ``head``,
    its matrix.

    Raises:
        DeliberateError: the model is of another kind, or the engine named cannot run it here.
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
    ) -> None:
        super().__init__(model)
        reason = unsupported(self)
        if reason is not None:
            raise DeliberateError(f"the fused executor cannot run this model: {reason}")
        self._lock = threading.RLock()
        self._structure = ModelStructure(model)
        self._watched = tuple(watched(self))
        self.version = 0
        self.plan = plan_for(model, self.num_layers, weights, head)
        self._wanted = None if engine is None else as_engine(engine)
        self._warm = False
        self.boundaries = (*boundaries, self.num_layers)
        self.contexts = SlotContexts(self.contexts)
        self._shapes = layer_shapes(self)
        self._share = share
        self._compiled = CompiledLayers(self.boundaries, self._shapes, self.plan)
        self.eps = float(self.norm.variance_epsilon)  # type: ignore[arg-type]
        self._weights: tuple[LayerWeights, ...] = ()
        self._layers: NativeLayers | None = None
        self._top: NativeHead | None = None
        self._bare_top: NativeHead | None = None
        self._built: object = None
        self.refresh()

    def refresh(self, *, same_modules: bool = False) -> bool:
        """Takes up weights that were moved or, where copies are kept, changed; True if any were.

        Called before a generation: training, loading, ``.to`` or resized embeddings are seen.

        Args:
            same_modules: the caller knows that no module was replaced; only weights are looked at.

        Raises:
            DeliberateError: it is no longer a model that this executor can run (an injected
                adapter, a hook), or the engine that was asked for cannot run it.
        """
        same = same_modules or self._structure.same()
        if same and self._weights_now() == self._built:
            return False
        with self._lock:
            if not same and not self._structure.same():
                self._view_anew()
            if self._weights_now() == self._built:
                return False
            self.gain = self.norm.weight.detach()  # type: ignore[operator]
            before = getattr(self, "engine", None)
            self.engine, why_eager = choose_engine(self.gain, self._wanted, self.plan)
            native = self.engine is LayerEngine.NATIVE
            self._weights = fuse_layers(self, self.plan, share=self._share, panels=native)
            with torch.inference_mode(False), torch.no_grad():
                self.head: Stored = stored(self.lm_head, self.plan.head, panels=native)
            self._layers = NativeLayers(self._weights, self._shapes) if native else None
            self._top = NativeHead(self.gain, self.eps, self.head) if native else None
            self._bare_top = NativeHead(None, self.eps, self.head) if native else None
            if self.engine is not before:
                self.programs, self._warm = Programs(why_eager), False
            self.version += 1
            # Joining has moved the parameters.
            self._built = self._weights_now()
        return True

    def _weights_now(self) -> object:
        copies = not (self._share and self.plan.native)
        return fingerprint(self._watched) if copies else places(self._watched)

    def _view_anew(self) -> None:
        """Reads the model's modules anew after they were changed."""
        structure, fresh = ModelStructure(self.model), Backbone(self.model)
        reason = unsupported(fresh)
        if reason is not None:
            raise DeliberateError(
                f"the model was changed since it was wrapped and the fused executor cannot run it "
                f"as it is: {reason}; merge adapters into it (merge_and_unload), or wrap it anew "
                'with executor="generic"'
            )
        if fresh.num_layers != self.num_layers or layer_shapes(fresh) != self._shapes:
            raise DeliberateError(
                "the model's layers were replaced by others since it was wrapped: wrap it anew"
            )
        contexts = SlotContexts(fresh.contexts)
        vars(self).update(vars(fresh) | {"contexts": contexts})
        self._structure, self._built = structure, None
        self._watched = tuple(watched(self))

    def turn(self) -> AbstractContextManager[Any]:
        """What a generation must hold while it runs: nothing, what a pass writes is its cache's."""
        return nullcontext()

    def __reduce__(self) -> Any:  # as a model and settings: addresses are of this process
        return _rebuilt, (type(self), self.model, self._settings())

    def _settings(self) -> dict[str, Any]:
        """Arguments that make the same executor of a copy of the model."""
        return {
            "boundaries": self.boundaries[:-1],
            "weights": self.plan,
            "share": self._share,
            "engine": self._wanted,
        }

    @property
    def serves_batches(self) -> bool:
        """Whether batches are best run here, rather than by transformers' own modules."""
        return self.engine is LayerEngine.NATIVE

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, keys and values."""
        return self.gain.dtype

    @property
    def bytes_per_token(self) -> int:
        """Weights read for one token through all layers and the head."""
        return sum(layer.nbytes for layer in self._weights) + self.head.nbytes

    def new_cache(self, capacity: int = 0, batch: int = 1) -> SegmentCache:
        """An empty cache whose buffers exist from the start.

        The first one for a single sequence compiles what decoding needs (`warm_up`), so that no
        step of a generation waits for the compiler.
        """
        self.refresh()
        if batch == 1 and not self._warm and self.programs.reason is None:
            with self._lock:
                if not self._warm:
                    self.warm_up()
        return StaticCache(self._shapes, self.gain, capacity, batch)

    def new_int8_cache(self, capacity: int = 0, batch: int = 1) -> SegmentCache:
        """As `Backbone.new_int8_cache`: what the C++ kernels read."""
        self.refresh()
        if self._layers is None:
            return super().new_int8_cache(capacity, batch)
        return Int8StaticCache(self._shapes, self.gain, capacity, batch)

    def new_block_cache(self, blocks: int, **settings: Any) -> BlockCache:
        """As `Backbone.new_block_cache`.

        Raises:
            DeliberateError: the layers are not run by the C++ kernels.
        """
        self.refresh()
        if self._layers is None:
            raise DeliberateError(
                f'a cache in blocks with engine="{self.engine}": only the C++ kernels (float32 on '
                'a CPU), those of a CUDA device and executor="generic" read one; use new_cache'
            )
        share = not self.rope_follows_length
        return NativeBlockCache(self._shapes, self.gain, blocks, share=share, **settings)

    @torch.inference_mode()
    def embed(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """Token ids ``[B, q]`` -> input of the first layer, ``[B, q, d]``.

        Raises:
            DeliberateError: an id that the embedding has no row for.
        """
        try:
            return super().embed(input_ids, ctx)
        except IndexError:
            raise DeliberateError(
                f"token id {int(input_ids.max())} has no embedding: the model has "
                f"{self._embed.num_embeddings} (its head chooses among {self.vocab_size})"
            ) from None

    @torch.inference_mode()
    def run_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> Tensor:
        """As `Backbone.run_layers`."""
        cache.begin(ctx, first, last)
        slots, holes = ctx.masks[SLOTS], ctx.masks[HOLES]
        assert slots is not None and isinstance(cache, NativeCache)
        cache.reserve(len(slots))
        if self._layers is not None:
            hidden = self._layers.run(hidden, first, last, ctx, cache)
            cache.advance(ctx, first, last)
            return hidden
        assert isinstance(cache, StaticCache)
        q = ctx.positions.shape[1]
        single = cache.batch == 1 and holes is None and q <= MOST_TOKENS
        rotary = ctx.position_embeddings
        if single:
            weights, kv = self._weights[first:last], cache.buffers(first, last)
            tables = rotary[0][0], rotary[1][0]
            flat = self._compiled.run(
                self.programs, hidden[0], first, last, weights, kv, ctx.positions[0], tables, slots
            )
            hidden = flat.unsqueeze(0)
        else:
            weights, shapes = self._weights[first:last], self._shapes[first:last]
            kv, rows = cache.buffers(first, last), ctx.rows if ctx.ragged else None
            hidden = run_block(
                hidden, weights, kv, ctx.positions, rotary, slots, rows, holes, shapes, None
            )
        cache.advance(ctx, first, last)
        return hidden

    @torch.inference_mode()
    def fill_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> None:
        """As `Backbone.fill_layers`."""
        cache.begin(ctx, first, last, write_only=True)
        slots = ctx.masks[SLOTS]
        assert slots is not None and isinstance(cache, NativeCache)
        cache.reserve(len(slots))
        if self._layers is not None:
            self._layers.fill(hidden, first, last, ctx, cache)
            cache.advance(ctx, first, last)
            return
        assert isinstance(cache, StaticCache)
        weights, shapes = self._weights[first:last], self._shapes[first:last]
        kv, rows = cache.buffers(first, last), ctx.rows if ctx.ragged else None
        rotary = ctx.position_embeddings
        fill_block(hidden, weights, kv, ctx.positions, rotary, rows, shapes, None)
        cache.advance(ctx, first, last)

    def multi_step(self, reader: ExitReader | None) -> NativeMultiStep | None:
        """As `Backbone.multi_step`: by the C++ kernels, where rotary tables are fixed."""
        self.refresh()
        if self._layers is None or self._top is None:
            return None
        heads = reader.heads if isinstance(reader, FusedReader) else {}
        measure = MAX_PROB if reader is None else reader.measure
        made = NativeMultiStep(self._layers, self._top, heads, measure, self._embed, self.contexts)
        return made if made.possible else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: ``[..., d]`` -> ``[..., V]``; by modules in training."""
        if self.differentiates(hidden):
            return super().logits(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._top is not None:
            return self._top.logits(flat).view(*hidden.shape[:-1], -1)
        return self.read(flat)[0].view(*hidden.shape[:-1], -1)

    def read_full_depth(self, hidden: Tensor) -> HeadOutput:
        """As `Backbone.read_full_depth`."""
        if self._top is None:
            return super().read_full_depth(hidden)
        return HeadOutput(*self._top.read(hidden, MAX_PROB))

    def head_logits(self, normed: Tensor, rows: Tensor | None = None) -> Tensor:
        """Head of what has been normed already: ``[..., d]`` -> ``[..., V]``; as `logits`."""
        if rows is not None or self.differentiates(normed):
            return super().head_logits(normed, rows)
        with torch.inference_mode():
            if self._bare_top is not None:
                flat = normed.reshape(-1, normed.shape[-1])
                return self._bare_top.logits(flat).view(*normed.shape[:-1], -1)
            return product(normed, self.head)

    def differentiates(self, states: Tensor) -> bool:
        """Whether these states are part of a computation that gradients are taken of.

        The kernels know no gradients: an objective that called them would train nothing. What
        `run_layers` gives, and whatever is decoded, is made in inference mode.
        """
        return torch.is_grad_enabled() and self.plan.native and not states.is_inference()

    def read(
        self,
        states: Tensor,
        head: Stored | None = None,
        *,
        factors: tuple[Tensor, ...] = (),
        score: Score | None = None,
    ) -> tuple[Tensor, ...]:
        """What a head, the model's own by default, makes of states ``[R, d]``; see `read_head`."""
        read = self.head if head is None else head
        assert isinstance(read, Matrix)
        return read_head(
            self.programs,
            states,
            self.gain,
            self.eps,
            read,
            factors=factors,
            score=score,
        )

    def exit_reader(self, heads: ExitHeads, **settings: Any) -> FusedReader:
        """A reader of these exits through this executor; settings as for `ExitReader`."""
        self.refresh()
        return FusedReader(heads, self, **settings)

    def warm_up(self) -> float:
        """Compiles what decoding one sequence needs; returns the seconds it took."""
        began = time.perf_counter()
        self._warm = True
        cache = self.new_cache(SLOT_MULTIPLE)
        starts = (0, *self.boundaries[:-1])
        pieces = [*zip(starts, self.boundaries, strict=True), (0, self.num_layers)]
        for q in (1, 2, FEW_ROWS + 1):  # one token, a few, more
            ctx = self.context(0, q, device=self.device)
            ids = torch.zeros((1, q), dtype=torch.int64, device=self.device)
            for first, last in dict.fromkeys(pieces):
                hidden = self.run_layers(self.embed(ids, ctx), first, last, ctx, cache)
                cache.crop(0)
            self.logits(hidden[0])
        return time.perf_counter() - began


def _rebuilt(kind: type[FusedBackbone], model: Any, settings: dict[str, Any]) -> FusedBackbone:
    return kind(model, **settings)
