"""What a generation needs of the model that it decodes with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from deliberate.config import Fidelity
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.model_view import ModelView
from deliberate.policies.guarantees import CalibratedModel


class DecodableModel(CalibratedModel, ModelView, Protocol):
    """`deliberate.AdaptiveModel`, as generation sees it."""

    fidelity: Fidelity
    draft: Any
    guarantees: Any

    @property
    def generation_config(self) -> Any:
        """Of the wrapped model."""

    def turn(self) -> AbstractContextManager[Any]:
        """The lock that a generation holds while it runs."""

    def backbone_for(self, batch: int) -> Backbone:
        """The layers that decode a batch of this size."""

    def planner(self, exits: ExitConfig, batch: int = 1) -> DraftPlanner:
        """Exact mode's estimates at these thresholds."""
