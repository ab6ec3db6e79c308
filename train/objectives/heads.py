"""Exits for a frozen checkpoint, distilled from its last layer."""

from __future__ import annotations

import torch
from torch import Tensor

from deliberate.api.model import AdaptiveModel
from deliberate.train.losses import distillation_loss, gate_loss, token_cross_entropy
from deliberate.train.objectives.base import Objective, ObjectiveOutput, Recipe


class HeadsObjective(Objective):
    """Backbone frozen; translators and exit gates learn to predict what the last layer predicts.

    Per target token: ``kl_weight * KL(last layer || exit) + ce_weight * CE(exit, token of the last
    layer)`` and the gates' loss, averaged over exits.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 0.5,
        gate_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model)
        for parameter in model.base.parameters():
            parameter.requires_grad_(False)
        self.kl_weight, self.ce_weight = kl_weight, ce_weight
        self.gate_weight, self.temperature = gate_weight, temperature

    def train(self, mode: bool = True) -> HeadsObjective:
        """Training mode for the exits only: the frozen backbone keeps its dropout off."""
        super().train(mode)
        self.model.base.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch ``[B, T]``; `num_items_in_batch` is the step's count of targets."""
        exits, backbone = self.model.exits, self.model.backbone
        with torch.no_grad():
            states, targets = self.exit_states(input_ids, labels, position_ids)
            top = backbone.head_logits(states[-1])
        answer = top.argmax(dim=-1)
        losses, chosen, kept = [], [], []
        total = torch.zeros((), device=targets.device)
        for i, state in enumerate(states[:-1]):
            logits = backbone.head_logits(exits.translate(i, state))
            token = logits.detach().argmax(dim=-1)
            kl = distillation_loss(logits, top, temperature=self.temperature)
            total = total + self.kl_weight * kl
            total = total + self.ce_weight * token_cross_entropy(logits, answer)
            gate = gate_loss(exits.gate_logit(i, state), token == answer)
            total = total + self.gate_weight * gate
            losses.append(token_cross_entropy(logits.detach(), targets))
            chosen.append(token)
            if self.measuring:
                kept.append(logits.detach())
        losses.append(token_cross_entropy(top, targets))
        chosen.append(answer)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        total = total / (len(states) - 1)
        return ObjectiveOutput(
            loss=total / count,
            sums=self.log_sums(losses, chosen, targets),
            measured=self.measure(states[:-1], [*kept, top]),
        )


RECIPE = Recipe(HeadsObjective, keeps_base=True)
