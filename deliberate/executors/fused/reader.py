"""Heads of the fused executor: final norm, translator, head and score in one compiled call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.cache.kv_cache import SegmentCache
from deliberate.executors.fused.implementation import LayerEngine
from deliberate.executors.fused.native import CPP_KERNELS, NativeHead
from deliberate.executors.fused.ops import rms_norm
from deliberate.executors.fused.programs import Programs, Varying, canonical
from deliberate.executors.quantization import Matrix, Rows, Storage, Stored, product, store
from deliberate.modeling.exit_heads import (
    ExitHeads,
    ExitReader,
    FullTranslator,
    LowRankTranslator,
    Reading,
)
from deliberate.modeling.measures import MAX_PROB, MEASURES, require_known

# Rows up to which the head is compiled; with more (scoring a prompt) it is a plain product.
MOST_HEAD_ROWS = 32

# Logits ``[R, V]`` -> tokens and scores ``[R]``.
Score = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.inference_mode()
def read_head(
    programs: Programs,
    states: Tensor,
    gain: Tensor,
    eps: float,
    head: Matrix,
    *,
    factors: tuple[Tensor, ...] = (),
    score: Score | None = None,
) -> tuple[Tensor, ...]:
    """What a head makes of hidden states ``[R, d]``.

    Args:
        programs: where it is compiled.
        gain, eps: of the final norm.
        head: ``[V, d]``.
        factors: of a translator x -> x + ... F2 F1 x; empty where it is folded into the head.
        score: also computed, or None.

    Returns:
        ``(logits [R, V],)``, and with `score` tokens and scores ``[R]`` after it.
    """
    rows = Rows.of(len(states))

    def norm_and_head(
        states: Tensor, gain: Tensor, head: Matrix, factors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        normed = rms_norm(states.unsqueeze(0) if rows is Rows.ONE else states, gain, eps)
        update = normed
        for factor in factors:
            update = F.linear(update, factor)
        logits = product(normed + update if factors else normed, head, rows)
        return (logits,) if score is None else (logits, *score(logits))

    states = canonical(states[0] if rows is Rows.ONE else states)
    arguments = (states, gain, head, factors)
    if rows is Rows.MANY and len(states) > MOST_HEAD_ROWS:
        return norm_and_head(*arguments)
    varying: list[Varying] = [] if rows is Rows.ONE else [(states, 0)]
    key = ("head", rows, head.weight.dtype, len(factors), score)
    return programs.run(key, norm_and_head, arguments, lambda: varying)


class HeadSource(Protocol):
    """What a reader takes from the executor that makes it (`FusedBackbone`)."""

    norm: Any
    lm_head: Any
    plan: Any
    engine: Any
    programs: Any
    gain: Any
    eps: Any

    @property
    def softcap(self) -> Any:
        """Of the logits, or None."""

    @property
    def head(self) -> Any:
        """The model's own head as it is stored."""

    @property
    def head_logits(self) -> Any:
        """Logits of normed states."""

    @property
    def read(self) -> Any:
        """Norm, head and score in one call."""

    @property
    def hidden_size(self) -> int:
        """Width d of a hidden state."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""


class FusedReader(ExitReader):
    """Reads exits through the fused executor; those with the measure ``gate`` as `ExitReader` does.

    Args:
        heads: translators and gates.
        backbone: the executor; its weight plan's ``head`` is the storage of the folded heads.
        **settings: as for `ExitReader`.

    Attributes:
        heads: by exit, those that the C++ kernels read, where a head's answer is what is asked.
    """

    def __init__(self, heads: ExitHeads, backbone: HeadSource, **settings: Any) -> None:
        self._backbone = backbone
        self._native = native = backbone.engine is LayerEngine.NATIVE
        self._stored: dict[int, Stored] = {}
        super().__init__(
            heads,
            backbone.norm,
            backbone.lm_head,
            backbone.head_logits,
            backbone.softcap,
            **settings,
        )
        with torch.inference_mode(False), torch.no_grad():
            self._factors = [
                () if index in self._stored else _factors(translator)
                for index, translator in enumerate(heads.translators)
            ]
        self.heads: dict[int, NativeHead] = {}
        # Heads of what has been normed; and for the measure "gate" its probes and the heads.
        self._bare: dict[int, NativeHead] = {}
        self._gated: dict[int, tuple[NativeHead, NativeHead]] = {}
        if native:
            require_known(self.measure, CPP_KERNELS, lambda one: one.known_to_cpp)
            for index, factors in enumerate(self._factors):
                self._take_native(index, self._stored.get(index, backbone.head), factors)
        if backbone.programs.reason is None:
            state = torch.zeros(
                1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device
            )
            for index in range(len(heads.translators)):  # compiled before the first question
                self.evaluate(index, state, 1.0)

    def _keep_folded(self, index: int, matrix: Tensor) -> None:
        """As stored; the C++ kernels read nothing else, so for them the floats are not kept."""
        plan = self._backbone.plan
        # Rows of a head whose blocks lie in a file are rows of our own, multiplied by a translator.
        storage = Storage.INT8 if plan.head is Storage.FILE else plan.head
        self._stored[index] = store(matrix, storage, panels=self._native)
        if not self._native:
            super()._keep_folded(index, matrix)

    @property
    def folded_bytes(self) -> int:
        """As `ExitReader.folded_bytes`."""
        if not self._native:
            return super().folded_bytes
        return sum(matrix.nbytes for matrix in self._stored.values())

    def _take_native(self, index: int, matrix: Stored, factors: tuple[Tensor, ...]) -> None:
        """Builds what the C++ kernels read at one exit."""
        gain, eps = self._backbone.gain, self._backbone.eps
        self._bare[index] = NativeHead(None, eps, matrix, factors, ids=self.ids)
        head = NativeHead(gain, eps, matrix, factors, ids=self.ids)
        if not self.measure.before_head:
            self.heads[index] = head
            return
        probe: Any = self._heads.gates[index]
        weight, bias = probe.weight.detach(), probe.bias.detach()
        self._gated[index] = NativeHead(gain, eps, Matrix(weight), bias=bias), head

    def own_logits(self, exit_index: int, normed: Tensor) -> Tensor:
        """As `ExitReader.own_logits`, from the heads as they are stored."""
        bare = self._bare.get(exit_index)
        if bare is None:
            return super().own_logits(exit_index, normed)
        flat = normed.reshape(-1, normed.shape[-1])
        return bare.logits(flat).view(*normed.shape[:-1], -1)

    def every_score(self, exit_index: int, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ExitReader.every_score`; the C++ kernels give all their measures at once."""
        bare = self._bare.get(exit_index)
        known = all(one.known_to_cpp for one in MEASURES.values())
        if bare is None or not known:
            return super().every_score(exit_index, hidden)
        normed = self._norm(hidden)
        tokens, statistics = bare.every_statistic(normed)
        probe: Any = self._heads.gates[exit_index]
        scores = {}
        for name, measure in MEASURES.items():
            if measure.before_head:
                scores[name] = torch.sigmoid(probe(normed).squeeze(-1))
            else:
                assert measure.cpp_statistic is not None
                scores[name] = statistics[:, measure.cpp_statistic]
        return tokens, scores

    def _look_by_gate(
        self, exit_index: int, hidden: Tensor, threshold: float, keep_logits: bool
    ) -> Reading:
        """The probe's answer; the head is read for tokens that reach the threshold."""
        probe, head = self._gated[exit_index]
        # Not torch's: its last bit depends on how many numbers are computed together.
        confidences = [_sigmoid(one) for one in probe.logits(hidden)[:, 0].tolist()]
        tokens: list[int | None] = [None] * len(confidences)
        sure = [row for row, confidence in enumerate(confidences) if confidence >= threshold]
        if sure and not keep_logits:
            chosen = hidden if len(sure) == len(hidden) else hidden[sure]
            for row, token in zip(sure, head.read(chosen, MAX_PROB)[1], strict=True):
                tokens[row] = token
        return Reading(
            confidences,
            tokens,
            None,
            lambda row: self.widened(head.logits(hidden[row : row + 1])[0]),
        )

    def evaluate(
        self,
        exit_index: int,
        hidden: Tensor,
        threshold: float,
        *,
        keep_logits: bool = False,
        cache: SegmentCache | None = None,
    ) -> Reading:
        """As `ExitReader.evaluate`."""
        if exit_index in self._gated:
            return self._look_by_gate(exit_index, hidden, threshold, keep_logits)
        native = self.heads.get(exit_index)
        if native is not None:
            logits, tokens, scores = native.read(hidden, self.measure)
            return self.reading(scores, tokens, logits)
        if self.measure.before_head:
            return super().evaluate(exit_index, hidden, threshold, keep_logits=keep_logits)
        logits, token, score = self._backbone.read(
            hidden,
            self._stored.get(exit_index),
            factors=self._factors[exit_index],
            score=self._score,
        )
        return self.reading(score.tolist(), self.tokens_of(token).tolist(), logits)


def _sigmoid(x: float) -> float:
    share = math.exp(-abs(x))
    return (1.0 if x >= 0.0 else share) / (1.0 + share)


def _factors(translator: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(translator, LowRankTranslator):
        return translator.down.weight.detach(), translator.up.weight.detach()
    if isinstance(translator, FullTranslator):
        return (translator.delta.weight.detach(),)
    return ()
