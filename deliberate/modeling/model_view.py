"""What calibration and policies need of an adaptive model, without knowing its class."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader


class ModelView(Protocol):
    """A wrapped causal language model with exits: `deliberate.AdaptiveModel` is one."""

    gate: DeliberationGate | None
    draft: Any

    @property
    def base(self) -> Any:
        """The wrapped transformers model."""

    @property
    def backbone(self) -> Backbone:
        """Its layers, as decoding runs them."""

    @property
    def exits(self) -> ExitHeads:
        """Translators and probes of the exits."""

    @property
    def exit_config(self) -> ExitConfig:
        """Where the exits are and how they decide."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def reader(self, batch: int = 1) -> ExitReader:
        """Evaluates the exits' heads."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; with ``output_exit_states=True`` the states after each exit."""
