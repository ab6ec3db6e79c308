"""Exits and the top read by the registry's ops: no logits, one answer to the host, one graph.

An exit's answer is token, confidence and who goes on. The last of these also stays on the device as
a list, for the segment above (`deliberate.executors.fused.cuda.prefetch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.executors.fused.cuda.graphs import SegmentGraphs
from deliberate.executors.fused.cuda.layers import linear
from deliberate.executors.fused.cuda.prefetch import launch_above
from deliberate.executors.fused.reader import FusedReader
from deliberate.executors.quantization import Matrix
from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm
from deliberate.kernels.ops.exit_gate import decide
from deliberate.kernels.ops.exit_head import read_head
from deliberate.modeling.exit_heads import ExitHeads, Reading
from deliberate.modeling.head_output import HeadOutput
from deliberate.modeling.measures import MAX_PROB, Measure, require_known

# Rows that are read by the ops; more (scoring a prompt) are bound by arithmetic.
MOST_READ_ROWS = 32


class HeadBuffers:
    """Buffers of fixed address for reading up to `rows` states, and what was read of them.

    Attributes:
        hidden: ``[rows, d]``.
        listed, count: which of them are read: int32 ``[rows]``, an order of all rows, of which the
            first ``count [1]`` are meant.
        threshold: float32 ``[1]``.
        tokens: int64 ``[rows]``. confidence: float32 ``[rows]``.
        going, remaining: rows that do not reach the threshold: int32 ``[rows]`` and ``[1]``.
        packed: float64 ``[3, rows]``: confidence, token, whether it does not exit.
        graphs: of reading.
    """

    def __init__(self, rows: int, like: Tensor, graphs: SegmentGraphs) -> None:
        """``like``: of the device and dtype of hidden states, last dimension d."""
        device = like.device
        with torch.inference_mode(False):
            self.hidden = like.new_zeros((rows, like.shape[-1]))
            self.listed = torch.arange(rows, dtype=torch.int32, device=device)
            self.count = torch.full((1,), rows, dtype=torch.int32, device=device)
            self.threshold = torch.zeros(1, device=device)
            self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            self.confidence = torch.zeros(rows, device=device)
            self.going = torch.full((rows,), -1, dtype=torch.int32, device=device)
            self.remaining = torch.zeros(1, dtype=torch.int32, device=device)
            self.packed = torch.zeros((3, rows), dtype=torch.float64, device=device)
            # A probe that returns its input, to hand confidences to the gate's operator.
            self._one, self._zero = torch.ones(1, device=device), torch.zeros(1, device=device)
        self.graphs = graphs
        self._buffers: dict[str, Tensor] = {}
        self._asked = rows
        self._limit = 0.0

    def buffer(self, name: str, width: int) -> Tensor:
        """``[rows, width]`` like the states, the same one for a name."""
        if name not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[name] = self.hidden.new_zeros((len(self.hidden), width))
        return self._buffers[name]

    def put(self, states: Tensor) -> None:
        """Takes ``[R, d]`` to be read."""
        self.hidden[: len(states)] = states
        if len(states) != self._asked:
            self.count.fill_(len(states))
            self._asked = len(states)

    def limit(self, threshold: float) -> None:
        """Sets the threshold."""
        if threshold != self._limit:
            self.threshold.fill_(threshold)
            self._limit = threshold

    # -- what graphs are made of -----------------------------------------------------------------

    def read(
        self,
        gain: Tensor,
        eps: float,
        head: Matrix,
        factors: tuple[Tensor, ...] = (),
        measure: Measure = MAX_PROB,
        ids: Tensor | None = None,
    ) -> None:
        """Tokens and confidences of the listed states.

        Args:
            gain, eps: of the final norm.
            head: ``[V, d]``.
            factors: of a translator x -> x + ... F2 F1 x.
            measure: what confidence is.
            ids: int64 ``[V]``, the token of each row of the head; None: row i is of token i.
        """
        if self._reads(head, factors):
            down, up = factors if factors else (None, None)
            reading = read_head(
                self.hidden, head.weight, gain=gain, eps=eps, down=down, up=up,
                rows=self.listed, count=self.count,
            )  # fmt: skip
            # Entry i is of the i-th that was listed.
            places = self.listed.long()
            tokens = reading.tokens[:, 0]
            self.tokens.index_copy_(0, places, tokens if ids is None else ids[tokens])
            assert measure.from_head is not None  # `CudaReader` refuses the others
            self.confidence.index_copy_(0, places, measure.from_head(reading, len(head.weight)))
            return
        normed = self.buffer("read", self.hidden.shape[1])
        add_rmsnorm(self.hidden, None, gain, eps, normed)
        update = normed
        for factor in factors:
            update = torch.nn.functional.linear(update, factor)
        tokens, scores = measure.score(linear(normed + update if factors else normed, head))
        self.tokens.copy_(tokens if ids is None else ids[tokens])
        self.confidence.copy_(scores)

    def decide(self) -> None:
        """Who goes on, by the confidences: the gate's operator over their log-odds."""
        odds = torch.logit(self.confidence.clamp(max=1.0)).unsqueeze(1)
        decision = decide(
            odds, self._one, self._zero, self.threshold, rows=self.listed, count=self.count
        )
        self._note(decision.continues, decision.rows, decision.remaining)

    def decide_by_gate(
        self, gain: Tensor, eps: float, probe: Tensor, bias: Tensor, head: Matrix, **how: Any
    ) -> None:
        """Confidences and which rows exit, by a probe; tokens only of rows that exit."""
        decision = decide(
            self.hidden, probe, bias, self.threshold,
            gain=gain, eps=eps, rows=self.listed, count=self.count,
        )  # fmt: skip
        order = torch.arange(len(self.hidden), device=self.hidden.device)
        requested = torch.zeros_like(decision.continues)
        requested.scatter_(0, self.listed.long(), order < self.count)
        exits = requested & ~decision.continues
        if self._reads(head, how.get("factors", ())):
            # The rows that exit, in place of all that were listed.
            everyone, count = self.listed.clone(), self.count.clone()
            self.listed.copy_(torch.argsort((~exits).to(torch.uint8), stable=True))
            self.count.copy_(exits.sum())
            self.read(gain, eps, head, **how)
            self.listed.copy_(everyone)
            self.count.copy_(count)
        else:
            self.read(gain, eps, head, **how)
        self.confidence.copy_(decision.score)
        self._note(decision.continues, decision.rows, decision.remaining)

    def note(self) -> None:
        """Packs tokens and confidences, where no threshold is compared."""
        self.packed[0].copy_(self.confidence)
        self.packed[1].copy_(self.tokens)

    def _note(self, continues: Tensor, going: Tensor, remaining: Tensor) -> None:
        self.going.copy_(going)
        self.remaining.copy_(remaining)
        self.note()
        self.packed[2].copy_(continues)

    def _reads(self, head: Matrix, factors: tuple[Tensor, ...]) -> bool:
        """Whether `exit_head` reads this head: as it is, with no translator or a low-rank one."""
        return head.weight.dtype == self.hidden.dtype and len(factors) in (0, 2)


class LaterLogits(HeadOutput):
    """The full depth's tokens and probabilities, known; its logits are computed if asked for.

    Args:
        states: ``[R, d]``.
        tokens, probabilities: of each.
        compute: states -> logits ``[R, V]``.
    """

    __slots__ = ("_compute", "_made", "_states")

    def __init__(
        self,
        states: Tensor,
        tokens: list[int],
        probabilities: list[float],
        compute: Callable[[Tensor], Tensor],
    ) -> None:
        self.rounds = ()
        self._tokens, self._probabilities = tokens, probabilities
        self._states, self._compute = states, compute
        self._made: Tensor | None = None

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """``[R, V]``."""
        if self._made is None:
            self._made = self._compute(self._states)
        return self._made

    def take(self, rows: Sequence[int]) -> LaterLogits:
        """As `HeadOutput.take`."""
        tokens, probabilities = self.tokens, self.probabilities
        return LaterLogits(
            self._states[list(rows)],
            [tokens[row] for row in rows],
            [probabilities[row] for row in rows],
            self._compute,
        )


class CudaReader(FusedReader):
    """Reads exits through the ops; where logits are asked for, as `FusedReader` does.

    Args:
        heads: translators and gates.
        backbone: the executor, a `CudaFusedBackbone` (which makes this, so it is not imported).
        **settings: as for `ExitReader`.

    Attributes:
        steps: what decodes several tokens with these exits, once it has been made.
    """

    def __init__(self, heads: ExitHeads, backbone: Any, **settings: Any) -> None:
        if backbone.by_ops:
            require_known(heads.measure, "the CUDA kernels", lambda one: one.known_to_cuda)
        super().__init__(heads, backbone, **settings)
        self.steps: Any = None
        self._executor = backbone
        self._head_buffers: dict[tuple[int, int], tuple[HeadBuffers, Tensor]] = {}

    @torch.inference_mode()
    def evaluate(
        self,
        exit_index: int,
        hidden: Tensor,
        threshold: float,
        *,
        keep_logits: bool = False,
        cache: SegmentCache | None = None,
    ) -> Reading:
        """As `ExitReader.evaluate`; may launch the segment above before it waits for the answer."""
        executor, requested = self._executor, len(hidden)
        if keep_logits or not executor.by_ops or requested > MOST_READ_ROWS:
            return super().evaluate(exit_index, hidden, threshold, keep_logits=keep_logits)
        buffers, answer = self._buffers_for(exit_index, requested)
        buffers.put(hidden)
        buffers.limit(threshold)
        buffers.graphs.run("exit", lambda: self.record(exit_index, buffers))
        wait = executor.captures.device.post(buffers.packed, answer)
        layers = self._heads.config.layers
        launched = launch_above(executor, cache, exit_index, layers, buffers, requested)
        wait()
        confidences, tokens, going = (row[:requested] for row in answer.tolist())
        if launched is not None:
            launched.answered([row for row, continues in enumerate(going) if continues])
        gated = self.measure.before_head
        return Reading(
            confidences,
            [
                None if gated and continues else int(token)
                for token, continues in zip(tokens, going, strict=True)
            ],
            None,
            lambda row: self.logits(exit_index, self._norm(hidden[row])),
        )

    def record(self, exit_index: int, buffers: HeadBuffers) -> None:
        """Everything between an exit's states and its answer, on the device."""
        backbone = self._executor
        if not self.measure.before_head:
            self.read(exit_index, buffers)
            buffers.decide()
            return
        gate: Any = self._heads.gates[exit_index]
        probe, bias = gate.weight.detach()[0], gate.bias.detach()
        head, factors = self._head_of(exit_index)
        buffers.decide_by_gate(
            backbone.gain, backbone.eps, probe, bias, head, factors=factors, ids=self.ids
        )

    def read(self, exit_index: int, buffers: HeadBuffers) -> None:
        """Tokens and confidences of an exit by its head, on the device."""
        backbone = self._executor
        head, factors = self._head_of(exit_index)
        buffers.read(
            backbone.gain, backbone.eps, head, factors=factors, measure=self.measure, ids=self.ids
        )

    def _head_of(self, exit_index: int) -> tuple[Matrix, tuple[Tensor, ...]]:
        return self._stored.get(exit_index, self._executor.head), self._factors[exit_index]

    def _buffers_for(self, exit_index: int, rows: int) -> tuple[HeadBuffers, Tensor]:
        size = 1 << max(rows - 1, 0).bit_length()
        if (exit_index, size) not in self._head_buffers:
            graphs = SegmentGraphs(self._executor.captures)
            buffers = HeadBuffers(size, self._executor.gain, graphs)
            self._head_buffers[exit_index, size] = (
                buffers,
                self._executor.captures.device.host_buffer(buffers.packed),
            )
        return self._head_buffers[exit_index, size]
