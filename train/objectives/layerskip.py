"""Continued training of a stock checkpoint by LayerSkip's recipe, and distillation into exits.

LayerSkip: Elhoushi et al., 2024, arXiv:2404.16710. Progressive distillation: the deepest exit, that
has least to learn, first, then the shallower ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.train.curricula import (
    DropoutSchedule,
    ExitCurriculum,
    active_exits,
    curriculum_weights,
    dropout_scale,
)
from deliberate.train.losses import ExitScale, distillation_loss, token_cross_entropy
from deliberate.train.objectives.base import PretrainObjective


class LayerSkipObjective(PretrainObjective):
    """Joint training of all exits under a curriculum, from a trained model on.

    Args:
        scale, early_scale, layer_dropout, gate_weight: as in `PretrainObjective`.
        curriculum: which exits a step trains: ``all``, ``rotational`` or ``gradual``.
        rotation: with ``rotational``, every so many-th exit at a time.
        gradual_share: with ``gradual``, the share of the run by whose end all are trained.
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
        """Weights of the exits that this step trains and of the top; they sum to 1."""
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
        """The schedule's factor at this step."""
        return dropout_scale(self.dropout_schedule, self.step, self.steps)


class DistillObjective(LayerSkipObjective):
    """Exits, and with a teacher the whole model, learn from a teacher's distribution.

    Per target token of each exit in use: ``kl_weight * KL(teacher || exit) + ce_weight * CE(exit,
    target)``. Without a teacher the exits learn from the model's own last layer, which itself
    stays with the targets.

    Args:
        scale, early_scale, layer_dropout, gate_weight, gradual_share: as in `LayerSkipObjective`;
            the curriculum is gradual.
        kl_weight, ce_weight: of the two parts.
        temperature: of the divergence.
        teacher: a causal language model whose head has the student's tokens; kept out of the
            objective's parameters, frozen, in evaluation mode.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        scale: ExitScale | str = ExitScale.UNIFORM,
        early_scale: float = 1.0,
        layer_dropout: float = 0.0,
        gate_weight: float = 0.1,
        gradual_share: float = 0.5,
        kl_weight: float = 1.0,
        ce_weight: float = 0.5,
        temperature: float = 1.0,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            early_scale=early_scale,
            layer_dropout=layer_dropout,
            gate_weight=gate_weight,
            curriculum=ExitCurriculum.GRADUAL,
            gradual_share=gradual_share,
        )
        self.kl_weight, self.ce_weight, self.temperature = kl_weight, ce_weight, temperature
        # In a tuple nn.Module does not see it: it is neither trained nor saved nor wrapped.
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)

    @torch.no_grad()
    def teach(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
    ) -> Tensor | None:
        """The teacher's logits ``[N, V]`` at the target positions, over the student's tokens."""
        if not self._teacher:
            return None
        (teacher,) = self._teacher
        teacher.to(input_ids.device)
        logits = teacher(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX][:, : self.model.backbone.vocab_size]

    def taught(self, teacher: Tensor | None, top: Tensor) -> Tensor | None:
        """The teacher's logits, or the model's own last ones."""
        return top.detach() if teacher is None else teacher

    def token_loss(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """Divergence from the teacher and cross-entropy of the target; the latter alone at a top
        without teacher."""
        truth = token_cross_entropy(logits, targets)
        if teacher is None:
            return truth
        width = min(logits.shape[-1], teacher.shape[-1])  # heads may be padded differently
        learned = distillation_loss(
            logits[:, :width], teacher[:, :width], temperature=self.temperature
        )
        return self.kl_weight * learned + self.ce_weight * truth
