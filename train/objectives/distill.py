"""Progressive distillation: the deepest exit, which has least to learn, first."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.train.curricula import ExitCurriculum
from deliberate.train.losses import ExitScale, distillation_loss, token_cross_entropy
from deliberate.train.objectives.base import Recipe
from deliberate.train.objectives.layerskip import LayerSkipObjective
from deliberate.utils.errors import DeliberateError


class DistillObjective(LayerSkipObjective):
    """Exits, and with a teacher the whole model, learn from a teacher's distribution.

    Per target token of each active exit: ``kl_weight * KL(teacher || exit) + ce_weight * CE(exit,
    target)``. Without a teacher the exits learn from the model's own last layer, whose own loss is
    the cross-entropy of the targets.

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
    def teacher_logits(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
    ) -> Tensor | None:
        """The teacher's logits ``[N, V]`` at the target positions, over the student's tokens."""
        if not self._teacher:
            return None
        (teacher,) = self._teacher
        teacher.to(input_ids.device)
        logits = teacher(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX][:, : self.model.backbone.vocab_size]

    def exit_teacher(self, teacher: Tensor | None, top: Tensor) -> Tensor | None:
        """The teacher's logits, or the model's own last ones."""
        return top.detach() if teacher is None else teacher

    def token_loss(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """Divergence from the teacher and cross-entropy of the target; without a teacher, at the
        last layer, the latter alone."""
        truth = token_cross_entropy(logits, targets)
        if teacher is None:
            return truth
        width = min(logits.shape[-1], teacher.shape[-1])  # heads may be padded differently
        learned = distillation_loss(
            logits[:, :width], teacher[:, :width], temperature=self.temperature
        )
        return self.kl_weight * learned + self.ce_weight * truth


def check_teacher(cfg: DictConfig) -> None:
    """A model from random weights needs a teacher."""
    if cfg.model.kind == "scratch" and cfg.recipe.get("teacher") is None:
        raise DeliberateError(
            "recipe 'distill' from scratch needs a teacher: give recipe.teacher=FOLDER"
        )


RECIPE = Recipe(DistillObjective, from_scratch=True, check=check_teacher)
