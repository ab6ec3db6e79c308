"""Fused executor for the Llama family: joined weights, static cache, compiled layers.

`FusedBackbone` is a `Backbone` that runs the layers of Llama, Mistral, Qwen2 and Qwen3 models by
its own functions instead of transformers' modules. On a CPU one token of a small model costs
mostly the dispatch of some thirty operators a layer; here it is one compiled call for a run of
layers. `choose_executor` takes it where it can and says why where it cannot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deliberate.backbone import Backbone
from deliberate.cache import SegmentCache
from deliberate.config import Measure
from deliberate.contexts import StepContext
from deliberate.errors import DeliberateError
from deliberate.exits import ExitHeads, ExitReader, Reading
from deliberate.fused_cache import HOLES, SLOT_MULTIPLE, SLOTS, SlotContexts, StaticCache
from deliberate.fused_ops import fill_block, rms_norm, run_block
from deliberate.fused_programs import Programs, Varying
from deliberate.fused_weights import (
    LayerWeights,
    fingerprint,
    fuse_layers,
    layer_shapes,
    places,
    unsupported,
)
from deliberate.quantise import Matrix, WeightPlan, product, store

# Largest number of layers in one compiled function: what compilation takes grows with it, what a
# call costs beside its layers does not shrink any more.
MOST_LAYERS = 8
# Tokens of one compiled pass; longer ones (prompts) are bound by arithmetic and run eagerly.
MOST_TOKENS = 32
# Rows up to which the head is compiled; with more (scoring a prompt) it is a plain product.
MOST_HEAD_ROWS = 32


class Executor(StrEnum):
    """Which implementation runs the layers."""

    AUTO = "auto"
    GENERIC = "generic"
    FUSED = "fused"


def choose_executor(
    model: PreTrainedModel,
    executor: Executor | str = Executor.AUTO,
    *,
    boundaries: Sequence[int] = (),
    weights: str | Mapping[str, Sequence[int]] | WeightPlan | None = None,
    head: str | None = None,
    share: bool = True,
    compile: bool = True,
) -> tuple[Backbone, str]:
    """The executor for a model, and one line that says which it is and why.

    Args:
        model: the transformers model.
        executor: ``auto`` (fused where it can), ``generic`` or ``fused``.
        boundaries, weights, head, share, compile: as for `FusedBackbone`.

    Raises:
        DeliberateError: an unknown name; ``fused``, or smaller weights, for a model that only the
            generic executor can run.
    """
    try:
        wanted = Executor(executor)
    except ValueError:
        choices = ", ".join(Executor)
        raise DeliberateError(f"executor {executor!r} is unknown; it is one of {choices}") from None
    generic = Backbone(model)
    plan = WeightPlan.build(generic.num_layers, weights, head)
    reason = "asked for" if wanted is Executor.GENERIC else unsupported(generic)
    if reason is not None:
        if not plan.native:
            raise DeliberateError(f"int8 and bf16 weights need the fused executor: {reason}")
        if wanted is Executor.FUSED:
            raise DeliberateError(f"the fused executor cannot run this model: {reason}")
        return generic, f"generic: {reason}"
    fused = FusedBackbone(model, boundaries=boundaries, weights=plan, share=share, compile=compile)
    how = "compiled" if fused.programs.reason is None else f"eager, {fused.programs.reason}"
    return fused, f"fused: {generic.architecture}, {how}"


class FusedBackbone(Backbone):
    """The Llama family with joined weights; for inference only.

    One sequence is decoded by compiled functions (one token, or several in one pass), batches by
    the same functions run eagerly, so that a new batch size never waits for the compiler. Outputs
    equal those of `Backbone` up to rounding.

    Args:
        model: a model that `deliberate.fused_weights.unsupported` has nothing against.
        boundaries: exit layers: where passes begin and end.
        weights, head: storage of the layers and of the head, see `WeightPlan.build`.
        share: let the model's own parameters become views of the joined weights. Without it the
            weights of all layers are held twice.
        compile: False runs everything eagerly.

    Attributes: those of `Backbone`, and ``plan``, ``programs``.

    Raises:
        DeliberateError: the model is of another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        boundaries: Sequence[int] = (),
        weights: str | Mapping[str, Sequence[int]] | WeightPlan | None = None,
        head: str | None = None,
        share: bool = True,
        compile: bool = True,
    ) -> None:
        super().__init__(model)
        reason = unsupported(self)
        if reason is not None:
            raise DeliberateError(f"the fused executor cannot run this model: {reason}")
        self.plan = WeightPlan.build(self.num_layers, weights, head)
        self.programs = Programs(compile=compile)
        self.boundaries = (*boundaries, self.num_layers)
        self.contexts = SlotContexts(self.contexts)
        self._shapes = layer_shapes(self)
        self._share = share
        self._unit = _unit(self.boundaries)
        self._eps = float(self.norm.variance_epsilon)  # type: ignore[arg-type]
        self._weights: tuple[LayerWeights, ...] = ()
        self._head = Matrix(self.lm_head.weight.detach())  # type: ignore[operator]
        self._built: object = None
        self._functions: dict[tuple[int, int, bool], tuple[Any, Callable[..., Tensor]]] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Takes up weights that were moved or, where copies are kept, changed; True if any were.

        Called with every new cache, so that training or loading between generations is seen.
        """
        copies = not (self._share and self.plan.native)
        now: object = fingerprint(self) if copies else places(self)
        if now == self._built:
            return False
        self._weights = fuse_layers(self, self.plan, share=self._share)
        with torch.inference_mode(False), torch.no_grad():
            self._head = store(self.lm_head.weight, self.plan.head)  # type: ignore[arg-type]
            self._gain = self.norm.weight.detach()  # type: ignore[operator]
        # Joining has moved the parameters.
        self._built = fingerprint(self) if copies else places(self)
        return True

    @property
    def bytes_per_token(self) -> int:
        """Weights read for one token through all layers and the head."""
        return sum(layer.nbytes for layer in self._weights) + self._head.nbytes

    def new_cache(self, capacity: int = 0, batch: int = 1) -> SegmentCache:
        """An empty cache whose buffers exist from the start."""
        self.refresh()
        return StaticCache(self._shapes, self._gain, capacity, batch)

    @torch.inference_mode()
    def embed(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """Token ids ``[B, q]`` -> input of the first layer, ``[B, q, d]``."""
        return super().embed(input_ids, ctx)

    @torch.inference_mode()
    def run_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> Tensor:
        """As `Backbone.run_layers`."""
        cache.begin(ctx, first, last)
        slots, holes = ctx.masks[SLOTS], ctx.masks[HOLES]
        assert slots is not None and isinstance(cache, StaticCache)
        cache.reserve(len(slots))
        q = ctx.positions.shape[1]
        single = cache.batch == 1 and holes is None and q <= MOST_TOKENS
        rotary = ctx.position_embeddings
        if single:
            # Without the axis of size 1, whose stride depends on what a tensor was cut from:
            # compiled code is made for strides, too.
            flat = hidden[0].contiguous()
            positions, rotary = ctx.positions[0], (rotary[0][0], rotary[1][0])
            for start, end in self._blocks(first, last, q):
                weights, kv = self._weights[start:end], cache.buffers(start, end)
                arguments = (flat, weights, kv, positions, rotary, slots)
                flat = self._run_single(start, end, q, arguments)
            hidden = flat.unsqueeze(0)
        else:
            hidden = run_block(
                hidden,
                self._weights[first:last],
                cache.buffers(first, last),
                ctx.positions,
                rotary,
                slots,
                ctx.rows if ctx.ragged else None,
                holes,
                self._shapes[first:last],
                None,
            )
        cache.advance(ctx, first, last)
        return hidden

    @torch.inference_mode()
    def fill_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> None:
        """As `Backbone.fill_layers`."""
        cache.begin(ctx, first, last)
        slots = ctx.masks[SLOTS]
        assert slots is not None and isinstance(cache, StaticCache)
        cache.reserve(len(slots))
        fill_block(
            hidden,
            self._weights[first:last],
            cache.buffers(first, last),
            ctx.positions,
            ctx.position_embeddings,
            ctx.rows if ctx.ragged else None,
            self._shapes[first:last],
            None,
        )
        cache.advance(ctx, first, last)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: ``[..., d]`` -> ``[..., V]``."""
        return self.read(hidden, self._head)

    @torch.inference_mode()
    def head_logits(self, normed: Tensor) -> Tensor:
        """Head of what has been normed already: ``[..., d]`` -> ``[..., V]``."""
        return product(normed, self._head, None)

    def read(self, hidden: Tensor, head: Matrix) -> Tensor:
        """Final norm and a stored head ``[V, d]``: ``[..., d]`` -> ``[..., V]``."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self._read(flat, head, None)[0].view(*hidden.shape[:-1], -1)

    def read_and_score(
        self, hidden: Tensor, head: Matrix, score: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for states ``[R, d]``, with what `score` makes of the logits.

        Returns:
            logits ``[R, V]``, tokens ``[R]``, scores ``[R]``.
        """
        return self._read(hidden, head, score)  # type: ignore[return-value]

    @torch.inference_mode()
    def _read(
        self,
        flat: Tensor,
        head: Matrix,
        score: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, ...]:
        eps, rows = self._eps, 1 if len(flat) == 1 else None

        def norm_and_head(states: Tensor, gain: Tensor, head: Matrix) -> tuple[Tensor, ...]:
            flat = states if rows is None else states.unsqueeze(0)
            logits = product(rms_norm(flat, gain, eps), head, rows)
            return (logits,) if score is None else (logits, *score(logits))

        # As in `run_layers`: no axis of size 1, no strides but the plain ones.
        states = flat.contiguous() if rows is None else flat[0]
        if len(flat) > MOST_HEAD_ROWS:
            return norm_and_head(states, self._gain, head)
        key = ("head", rows, head.weight.dtype, score)
        varying: list[Varying] = [] if rows else [(states, 0)]
        return self.programs.run(key, norm_and_head, (states, self._gain, head), lambda: varying)

    def warm_up(self, *, tokens: Sequence[int] = (1, 3)) -> float:
        """Compiles what decoding one sequence needs; returns the seconds it took.

        Args:
            tokens: tokens per pass: 1, and any larger number for all larger ones.
        """
        began = time.perf_counter()
        cache = self.new_cache(SLOT_MULTIPLE * 2)
        for q in tokens:
            starts = (0, *self.boundaries[:-1])
            pieces = [*zip(starts, self.boundaries, strict=True), (0, self.num_layers)]
            for first, last in dict.fromkeys(pieces):
                ctx = self.context(0, q, device=self.device)
                ids = torch.zeros((1, q), dtype=torch.int64, device=self.device)
                hidden = self.run_layers(self.embed(ids, ctx), first, last, ctx, cache)
                cache.crop(0)
            self.logits(hidden[0])
        return time.perf_counter() - began

    def _blocks(self, first: int, last: int, q: int) -> list[tuple[int, int]]:
        """Cuts layers first..last-1 into runs, each of which is one call."""
        if self.programs.reason is not None:
            return [(first, last)] if first < last else []
        # A whole small model is one function for one token; otherwise few different sizes are
        # compiled.
        size = last - first
        whole = q == 1 and size == self.num_layers <= MOST_LAYERS
        step = size if whole or size % self._unit else self._unit
        return [(at, min(at + step, last)) for at in range(first, last, max(step, 1))]

    def _run_single(self, start: int, end: int, q: int, arguments: tuple[Any, ...]) -> Tensor:
        known = self._functions.get((start, end, q == 1))
        if known is None:
            known = self._functions[start, end, q == 1] = self._function(start, end, q == 1)
        key, function = known
        return self.programs.run(key, function, arguments, lambda: _varying(arguments, q))

    def _function(self, start: int, end: int, one: bool) -> tuple[Any, Callable[..., Tensor]]:
        """What runs these layers for one token or for several, and the key of what is compiled."""
        shapes = self._shapes[start:end]
        rows = 1 if one else None

        def layers(
            flat: Tensor,
            weights: Sequence[LayerWeights],
            kv: Sequence[tuple[Tensor, Tensor]],
            positions: Tensor,
            rotary: tuple[Tensor, Tensor],
            slots: Tensor,
        ) -> Tensor:
            cos, sin = rotary
            return run_block(
                flat.unsqueeze(0),
                weights,
                kv,
                positions.unsqueeze(0),
                (cos.unsqueeze(0), sin.unsqueeze(0)),
                slots,
                None,
                None,
                shapes,
                rows,
            ).squeeze(0)

        return ("layers", rows, shapes, self.plan.layers[start:end]), layers


class FusedReader(ExitReader):
    """Reads exits through the executor: norm, folded head and score in one compiled call.

    Exits without a folded head, and those with a gate, are read as `ExitReader` reads them.
    """

    def __init__(self, heads: ExitHeads, backbone: FusedBackbone, **settings: Any) -> None:
        super().__init__(
            heads,
            backbone.norm,
            backbone.lm_head,
            backbone.head_logits,
            backbone.softcap,
            **settings,
        )
        self._backbone = backbone
        with torch.inference_mode(False), torch.no_grad():
            self._stored = {
                index: store(folded, backbone.plan.head) for index, folded in self._folded.items()
            }

    def look(
        self, exit_index: int, hidden: Tensor, threshold: float, *, keep_logits: bool = False
    ) -> Reading:
        """As `ExitReader.look`."""
        stored = self._stored.get(exit_index)
        if stored is None or self._heads.config.measure is Measure.GATE:
            return super().look(exit_index, hidden, threshold, keep_logits=keep_logits)
        logits, token, score = self._backbone.read_and_score(hidden, stored, self._score)
        return Reading(score.tolist(), token.tolist(), logits)


def _varying(arguments: tuple[Any, ...], q: int) -> list[Varying]:
    """Sizes that change from call to call: slots, capacity and, with several, tokens."""
    flat, _, kv, positions, rotary, slots = arguments
    sizes = [(slots, 0), *((buffer, 2) for layer in kv for buffer in layer)]
    if q > 1:
        sizes += [(part, 0) for part in (flat, positions, *rotary)]
    return sizes


def _unit(boundaries: Sequence[int]) -> int:
    """Layers per compiled function that all segments are multiples of, at most `MOST_LAYERS`."""
    starts = (0, *boundaries[:-1])
    common = math.gcd(*(end - start for start, end in zip(starts, boundaries, strict=True)))
    return max(size for size in range(1, MOST_LAYERS + 1) if common % size == 0)
