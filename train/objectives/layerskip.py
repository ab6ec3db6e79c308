"""Continued training of a stock checkpoint by LayerSkip's recipe (Elhoushi et al., 2024,
arXiv:2404.16710)."""

from __future__ import annotations

from deliberate.api.model import AdaptiveModel
from deliberate.train.curricula import (
    DropoutSchedule,
    ExitCurriculum,
    active_exits,
    curriculum_weights,
    dropout_scale,
)
from deliberate.train.losses import ExitScale
from deliberate.train.objectives.base import Recipe
from deliberate.train.objectives.pretrain import PretrainObjective


class LayerSkipObjective(PretrainObjective):
    """Joint training of all exits under a curriculum, starting from a trained model.

    Args:
        scale, early_scale, layer_dropout, gate_weight: as in `PretrainObjective`.
        curriculum: which exits a step trains: ``all``, ``rotational`` or ``gradual``.
        rotation: with ``rotational``, one exit in so many is trained at a time.
        gradual_share: with ``gradual``, the share of the run after which all are trained.
        dropout_schedule: ``constant`` (a trained model) or ``exponential`` (from scratch).
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        scale: ExitScale | str = ExitScale.LINEAR,
        early_scale: float = 0.5,
        layer_dropout: float = 0.1,
        gate_weight: float = 0.1,
        curriculum: ExitCurriculum | str = ExitCurriculum.ROTATIONAL,
        rotation: int = 2,
        gradual_share: float = 0.5,
        dropout_schedule: DropoutSchedule | str = DropoutSchedule.CONSTANT,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            early_scale=early_scale,
            layer_dropout=layer_dropout,
            gate_weight=gate_weight,
        )
        self.curriculum, self.rotation = curriculum, rotation
        self.gradual_share, self.dropout_schedule = gradual_share, dropout_schedule

    def exit_weights(self) -> list[float]:
        """Weights of the exits that this step trains and of the last layer; they sum to 1."""
        active = active_exits(
            self.curriculum,
            self.step,
            self.steps,
            len(self.weights) - 1,
            interval=self.rotation,
            share=self.gradual_share,
        )
        return curriculum_weights(self.weights, active)

    def dropout_scale(self) -> float:
        """The dropout schedule's factor at this step."""
        return dropout_scale(self.dropout_schedule, self.step, self.steps)


RECIPE = Recipe(LayerSkipObjective)
