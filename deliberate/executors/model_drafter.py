"""Runs the drafts of `deliberate.engine.model_drafts`: all of a model's layers, or some."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels.draft_rules import ChainRule
from deliberate.modeling.backbone import Backbone


class ModelDrafter:
    """A model of the shape of the one that verifies, over the same keys and values.

    Args:
        backbone: its layers and head.
        layers: that run, numbered from 0, rising; all where None.

    Attributes:
        first: the first of them.
        backbone: the same.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int] | None = None) -> None:
        self.backbone = backbone
        kept = list(range(backbone.num_layers) if layers is None else layers)
        breaks = [at for at, (one, other) in enumerate(pairwise(kept), 1) if other != one + 1]
        self._runs = [
            (kept[first], kept[last - 1] + 1) for first, last in pairwise([0, *breaks, len(kept)])
        ]
        self.first = kept[0]
        self._in_calls: tuple[Any, Any] | None = None  # the version of the weights it was made for

    def new_cache(self) -> Any:
        """None of its own.

        Raises:
            RuntimeError: always; drafts are placed in the cache of an engine.
        """
        raise RuntimeError("drafts by the model itself lie in the cache of an engine: place them")

    @torch.inference_mode()
    def extend_rows(
        self, caches: Sequence[Any], states: Tensor, tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        """Runs one token of each sequence; final states ``[R, d]``.

        Args:
            caches: the ends of rows of one cache, in rising rows.
            states: not read.
            tokens: one of each.
        """
        cache, backbone = caches[0].cache, self.backbone
        rows = [one.row for one in caches]
        starts = [cache.length(self.first, row) for row in rows]
        ctx = backbone.pass_context(rows, starts, [1] * len(rows), batch=cache.batch)
        hidden = backbone.embed(torch.tensor(tokens, device=backbone.device), ctx)
        for first, last in self._runs:
            hidden = backbone.run_layers(hidden, first, last, ctx, cache)
        return hidden[:, -1]

    @torch.inference_mode()
    def read_rows(self, outputs: Tensor) -> list[tuple[int, float]]:
        """Token and its probability after each state ``[R, d]``."""
        read = self.backbone.read_full_depth(outputs)
        return list(zip(read.tokens, read.probabilities, strict=True))

    def part(
        self, cache: Any, states: Tensor, tokens: Sequence[int], rule: ChainRule, room: int
    ) -> Any:
        """What drafts inside a call of the C++ kernels that decodes; None where they do not run
        the layers.

        Args:
            cache, states, tokens, room: not read; the call knows its sequence.
            rule: how far to draft.
        """
        version = getattr(self.backbone, "version", None)
        if self._in_calls is None or self._in_calls[0] != version:
            self._in_calls = version, self.backbone.multi_step(None)
        steps = self._in_calls[1]
        return steps.model_part(self._runs, rule) if hasattr(steps, "model_part") else None
