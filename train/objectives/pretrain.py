"""A model from scratch, every exit trained jointly (LayerSkip, arXiv:2404.16710)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deliberate.api.model import AdaptiveModel
from deliberate.train.losses import (
    ExitScale,
    exit_loss_weights,
    gate_loss,
    layer_dropout_rates,
    token_cross_entropy,
)
from deliberate.train.objectives.base import Objective, ObjectiveOutput, Recipe


class PretrainObjective(Objective):
    """All exits trained jointly from scratch: LayerSkip's loss and layer dropout.

    Args:
        scale, early_scale: weights of the exits, see `exit_loss_weights`.
        layer_dropout: p_max of `layer_dropout_rates`; each row of a batch skips layers by itself.
        gate_weight: weight of the exit gates' loss, whose gradient does not reach the backbone.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        scale: ExitScale | str = ExitScale.LINEAR,
        early_scale: float = 0.5,
        layer_dropout: float = 0.05,
        gate_weight: float = 0.1,
    ) -> None:
        super().__init__(model)
        depth = model.backbone.num_layers
        self.weights = exit_loss_weights(
            model.exit_config.layers, depth, scale=scale, early_scale=early_scale
        )
        self.gate_weight = gate_weight
        for layer, rate in zip(
            model.backbone.layers, layer_dropout_rates(depth, layer_dropout), strict=True
        ):
            if rate > 0:
                layer.register_forward_hook(self._row_dropout(rate))

    def exit_weights(self) -> list[float]:
        """Weights of the exits and the last layer at this step; exits of weight 0 are skipped."""
        return self.weights

    def dropout_scale(self) -> float:
        """Factor on the layer dropout rates at this step."""
        return 1.0

    def token_loss(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """The loss of one exit, or of the last layer, summed over the tokens."""
        return token_cross_entropy(logits, targets)

    def teacher_logits(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
    ) -> Tensor | None:
        """A teacher's logits ``[N, V]`` at the target positions; None without a teacher."""
        return None

    def logits(self, normed: Tensor) -> Tensor:
        """Logits ``[N, classes]`` that the losses are taken over."""
        return self.model.backbone.head_logits(normed)

    def classes(self, targets: Tensor) -> Tensor:
        """Of each target token, its place among these logits."""
        return targets

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch ``[B, T]``; `num_items_in_batch` is the step's count of targets."""
        exits = self.model.exits
        teacher = self.teacher_logits(input_ids, labels, position_ids)
        states, targets = self.exit_states(input_ids, labels, position_ids)
        targets = self.classes(targets)
        weights = self.exit_weights()
        top = self.logits(states[-1])
        answer = top.detach().argmax(dim=-1)
        top_loss = self.token_loss(top, targets, teacher)
        total = weights[-1] * top_loss
        kept: list[Tensor] = []
        losses: list[Tensor | None] = []
        chosen: list[Tensor | None] = []
        for i, state in enumerate(states[:-1]):
            trained = weights[i] > 0
            if not trained:
                # Wrappers for several processes wait for a gradient of every parameter.
                total = total + 0.0 * self._touch(i)
                if not self.measuring:
                    losses.append(None)
                    chosen.append(None)
                    continue
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                logits = self.logits(exits.translate(i, state))
            token = logits.detach().argmax(dim=-1)
            loss = None
            if trained:
                loss = self.token_loss(logits, targets, self.exit_teacher(teacher, top))
                total = total + weights[i] * loss
                gate = gate_loss(exits.gate_logit(i, state.detach()), token == answer)
                total = total + self.gate_weight * gate
            losses.append(self._cross_entropy(logits, targets, loss))
            chosen.append(token)
            if self.measuring:
                kept.append(logits.detach())
        sums = self.log_sums(
            [*losses, self._cross_entropy(top, targets, top_loss)], [*chosen, answer], targets
        )
        if teacher is not None:
            sums["loss/teacher"] = token_cross_entropy(teacher, targets)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        return ObjectiveOutput(
            loss=total / count,
            sums=sums,
            measured=self.measure([s.detach() for s in states[:-1]], [*kept, top.detach()]),
        )

    def _cross_entropy(self, logits: Tensor, targets: Tensor, loss: Tensor | None) -> Tensor:
        """Summed cross-entropy of logits whose `token_loss` this was, if they are trained.

        Where that is the cross-entropy it is not computed again: over 49,152 rows of a head a
        second one takes as much memory as the logits in float32.
        """
        if loss is not None and type(self).token_loss is PretrainObjective.token_loss:
            return loss.detach()
        return token_cross_entropy(logits.detach(), targets)

    def exit_teacher(self, teacher: Tensor | None, top: Tensor) -> Tensor | None:
        """The teacher's logits for the exits; `top`: the last layer's logits."""
        return teacher

    def _touch(self, exit_index: int) -> Tensor:
        exits = self.model.exits
        parameters = [*exits.translators[exit_index].parameters()]
        parameters += [*exits.gates[exit_index].parameters()]
        return torch.stack([p.sum() for p in parameters]).sum()

    def _row_dropout(self, rate: float) -> Any:
        """Forward hook that lets each row of a batch skip the layer with probability `rate`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not module.training:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            now = rate * self.dropout_scale()
            keep = torch.rand(hidden.shape[0], 1, 1, device=hidden.device) >= now
            mixed = torch.where(keep, hidden, args[0])
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook


RECIPE = Recipe(PretrainObjective, from_scratch=True, from_checkpoint=False)
