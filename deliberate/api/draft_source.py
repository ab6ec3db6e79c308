"""The drafts of a generation in exact mode, where they come from a draft layer.

The executor of the layer and the estimates of what its drafts are worth live as long as the model;
keys and values of the layer belong to one generation.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.executors.draft_cache import DraftRows
from deliberate.executors.draft_executor import DraftExecutor
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer

DEFAULT_DRAFTS = 6
"""Most drafts of a pass by a draft layer, where the caller does not say."""


class SharedRows:
    """Where the layer's keys and values of the sequences of one engine lie."""

    def __init__(self) -> None:
        self._held: tuple[DraftExecutor, DraftRows] | None = None

    def of(self, executor: DraftExecutor) -> DraftRows:
        """Those for what runs the layer now; sequences that another one began keep theirs."""
        held = self._held
        if held is None or held[0] is not executor:
            held = self._held = executor, executor.new_rows()
        return held[1]


class DraftSources:
    """The draft layer of one model, ready to draft.

    Args:
        layer: trained; it is read anew when it or the backbone's weights change.
        prior: what was measured when it was trained.
    """

    def __init__(self, layer: DraftLayer, prior: DraftPrior) -> None:
        self.layer, self.prior = layer, prior
        self._lock = threading.Lock()
        # Of one sequence, and of batches, which other modules may run.
        self._held: dict[bool, tuple[Any, DraftExecutor]] = {}
        self._lengths: dict[int, DraftLengths] = {}

    def __reduce__(self) -> Any:  # addresses and locks are of this process
        return DraftSources, (self.layer, self.prior)

    def build(self, backbone: Backbone) -> None:
        """Builds what runs the layer on this model, which the first request waits for else."""
        with self._lock:
            self._executor(backbone)

    def drafts(
        self, backbone: Backbone, most: int, lookup: int, rows: SharedRows | None = None
    ) -> LayerDrafts:
        """Drafts of one sequence.

        Args:
            backbone: what decodes it.
            most: drafts of a pass at most.
            lookup: n-gram drafts of a pass at most, 0 for none.
            rows: of the engine that it shares passes in; None outside of one.
        """
        with self._lock:
            lengths = self._lengths.setdefault(most, DraftLengths(self.prior, most))
            executor = self._executor(backbone)
            shared = None if rows is None else rows.of(executor)
        own = NgramDrafts(lookup) if lookup else None
        on_cpu = torch.device(backbone.device).type == "cpu"
        return LayerDrafts(
            executor, lengths, rows=shared, lookup=own, clock=Stopwatch(on_cpu=on_cpu).work
        )

    def _executor(self, backbone: Backbone) -> DraftExecutor:
        weights = (*self.layer.parameters(), *backbone.lm_head.parameters())
        key = (
            *(backbone, getattr(backbone, "version", 0), backbone.dtype, backbone.device),
            *((weight.data_ptr(), weight._version) for weight in weights),
        )
        slot = isinstance(backbone, FusedBackbone)
        if slot not in self._held or self._held[slot][0] != key:
            self._held[slot] = key, DraftExecutor(self.layer, backbone)
        return self._held[slot][1]
