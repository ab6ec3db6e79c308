"""Drafts by the model itself, run more cheaply: by some of its layers, or with rounded weights.

Layers that are left out (SWIFT, arXiv:2410.06916) and weights of fewer bits (QSpec,
arXiv:2410.11305) give a model of the same shape, which reads the keys and values that full depth
has written and needs none of its own: what it writes for its drafts is dropped before they are
verified. So it costs no pass over the prompt, and of memory only its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.draft_chain import Chain
from deliberate.engine.draft_plan import DraftPlan, call_passes
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.kernels.native_drafted import DraftedTokens


class RowEnd:
    """The end of one row of an engine's cache, where drafts are written and dropped again.

    Args:
        cache, row: of the sequence.
        layer: the first that drafts run through.
    """

    def __init__(self, cache: SegmentCache, row: int, layer: int) -> None:
        self.cache, self.row = cache, row
        self._layer = layer

    @property
    def length(self) -> int:
        """Tokens that the layer holds."""
        return self.cache.length(self._layer, self.row)

    def crop(self, length: int) -> None:
        """Drops what lies behind so many tokens."""
        self.cache.crop(length, self.row)


class ModelDrafts(LayerDrafts):
    """As `LayerDrafts`, by a runner that writes into the cache of the engine.

    Args:
        runner: see `deliberate.executors.model_drafter.ModelDrafter`.
        *args, **kwargs: of `LayerDrafts`.
    """

    def __init__(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(runner, *args, **kwargs)
        self._none = torch.empty(1, 0)

    def place(self, cache: SegmentCache, row: int) -> None:
        """Where the sequence's keys and values lie, before drafts are asked for."""
        held = self._cache
        if held is None or held.cache is not cache or held.row != row:
            runner: Any = self.runner
            self._cache = RowEnd(cache, row, runner.first)
            self.shared = cache  # sequences of one cache share passes

    def saw(self, position: int, states: Tensor) -> None:
        """Nothing is read of them."""

    def plan(self, ids: Sequence[int], room: int) -> DraftPlan | None:
        """As `DraftSource.plan`: while drafts are worth making, where one call can make them."""
        if not self.drafts_now:
            return None
        part = self.runner.part(None, self._none, (), self._rule(), room)
        if part is None:
            return None
        lengths = self._lengths
        each = lengths.single  # of a pass, and its drafts, two or three mostly, are no small part
        passes = call_passes(None if each is None else each + 2 * lengths.draft_seconds)
        return DraftPlan(None, self._looked_up_rule(), passes, model=part)

    def note_passes(self, made: DraftedTokens, position: int, unit: float) -> None:
        """As `DraftSource.note_passes`; of drafts nothing is kept."""
        self._learn(made, unit)

    def forget(self) -> None:
        """The sequence has lost its row."""
        self._cache = None

    def end(self, chain: Chain, seconds: float) -> list[int]:
        """As `LayerDrafts.end`; the newest token is run again, by full depth."""
        chain.verified -= 1
        return super().end(chain, seconds)

    def _catch_up(self, ids: Sequence[int]) -> tuple[Tensor, list[int]] | None:
        # Where tokens before the newest have no keys and values yet, full depth comes first.
        return (self._none, [ids[-1]]) if self.entries == len(ids) - 1 else None
