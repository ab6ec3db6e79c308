"""The fused executor's layers for one sequence as functions compiled by torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deliberate.executors.fused.ops import run_block
from deliberate.executors.fused.programs import Programs, Varying, canonical
from deliberate.executors.fused.weights import LayerShape, LayerWeights
from deliberate.executors.quantization import Rows, WeightPlan

# Layers of one compiled function at most: what compilation takes grows with them.
MOST_LAYERS = 2
# A whole model of so few layers, each of so few bytes, is one function for one token as well: the
# 35 us that each call costs beside its layers are a fifth of a token of the bundled model.
MOST_WHOLE_LAYERS = 8
MOST_WHOLE_BYTES = 8 << 20
# Tokens of one compiled pass; longer ones (prompts) are bound by arithmetic and run eagerly.
MOST_TOKENS = 32


class CompiledLayers:
    """Runs of layers of one model, each compiled for one token, a few, and more.

    Args:
        boundaries: where passes begin and end, the number of layers last.
        shapes: of all layers.
        plan: how their weights are stored.
    """

    def __init__(
        self, boundaries: Sequence[int], shapes: Sequence[LayerShape], plan: WeightPlan
    ) -> None:
        self._unit = _unit(boundaries)
        self._shapes = shapes
        self._plan = plan
        self._functions: dict[tuple[int, int, Rows], tuple[Any, Callable[..., Tensor]]] = {}

    def run(
        self,
        programs: Programs,
        hidden: Tensor,
        first: int,
        last: int,
        weights: Sequence[LayerWeights],
        kv: Sequence[tuple[Tensor, Tensor]],
        positions: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> Tensor:
        """Takes ``hidden [q, d]`` of one sequence through layers first..last-1.

        Args:
            weights, kv: of these layers; see `run_block`.
            positions: ``[q]``.
            rotary: cos and sin, ``[q, D]``.
        """
        flat, q = canonical(hidden), len(hidden)
        for start, end in self._runs(programs, first, last, q, weights):
            mine = slice(start - first, end - first)
            arguments = (flat, weights[mine], kv[mine], positions, rotary, slots)
            flat = self._run(programs, start, end, q, arguments)
        return flat

    def _runs(
        self,
        programs: Programs,
        first: int,
        last: int,
        q: int,
        weights: Sequence[LayerWeights],
    ) -> list[tuple[int, int]]:
        """Cuts layers first..last-1 into runs, each of which is one call."""
        if programs.reason is not None:
            return [(first, last)] if first < last else []
        size = last - first
        whole = q == 1 and size == len(self._shapes) <= MOST_WHOLE_LAYERS
        whole = whole and max(layer.nbytes for layer in weights) <= MOST_WHOLE_BYTES
        step = size if whole or size % self._unit else self._unit
        return [(at, min(at + step, last)) for at in range(first, last, max(step, 1))]

    def _run(
        self, programs: Programs, start: int, end: int, q: int, arguments: tuple[Any, ...]
    ) -> Tensor:
        rows = Rows.of(q)
        known = self._functions.get((start, end, rows))
        if known is None:
            known = self._functions[start, end, rows] = self._function(start, end, rows)
        key, function = known
        return programs.run(key, function, arguments, lambda: _varying(arguments, q))

    def _function(self, start: int, end: int, rows: Rows) -> tuple[Any, Callable[..., Tensor]]:
        """What runs these layers for so many tokens, and the key of what is compiled."""
        shapes = self._shapes[start:end]

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

        return ("layers", rows, shapes, self._plan.layers[start:end]), layers


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
