"""The drafts of a generation in exact mode, where they come from a draft layer.

The executor of the layer and the estimates of what its drafts are worth live as long as the model;
keys and values of the layer belong to one generation.
"""

from __future__ import annotations

import threading
from typing import Any

from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.executors.draft_executor import DraftExecutor
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer

DEFAULT_DRAFTS = 6
"""Most drafts of a pass by a draft layer, where the caller does not say."""


class DraftSources:
    """The draft layer of one model, ready to draft.

    Args:
        layer: trained; it is read anew when it or the backbone's weights change.
        prior: what was measured when it was trained.
    """

    def __init__(self, layer: DraftLayer, prior: DraftPrior) -> None:
        self.layer, self.prior = layer, prior
        self._lock = threading.Lock()
        self._held: tuple[Any, DraftExecutor] | None = None
        self._lengths: dict[int, DraftLengths] = {}

    def __reduce__(self) -> Any:  # addresses and locks are of this process
        return DraftSources, (self.layer, self.prior)

    def drafts(self, backbone: Backbone, most: int, lookup: int) -> LayerDrafts:
        """Drafts of one sequence.

        Args:
            backbone: what decodes it.
            most: drafts of a pass at most.
            lookup: n-gram drafts of a pass at most, 0 for none.
        """
        with self._lock:
            lengths = self._lengths.setdefault(most, DraftLengths(self.prior, most))
            executor = self._executor(backbone)
        return LayerDrafts(executor, lengths, lookup=NgramDrafts(lookup) if lookup else None)

    def _executor(self, backbone: Backbone) -> DraftExecutor:
        weights = (*self.layer.parameters(), *backbone.lm_head.parameters())
        key = (
            *(backbone, getattr(backbone, "version", 0), backbone.dtype, backbone.device),
            *((weight.data_ptr(), weight._version) for weight in weights),
        )
        if self._held is None or self._held[0] != key:
            self._held = key, DraftExecutor(self.layer, backbone)
        return self._held[1]
