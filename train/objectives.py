"""What a recipe optimises: a module around an adaptive model whose forward returns the loss.

The loss is computed inside `forward`, so that wrappers for several processes see every parameter
that takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from deliberate.model import AdaptiveModel
from deliberate.train.losses import (
    IGNORE_INDEX,
    ExitScale,
    distillation_loss,
    exit_loss_weights,
    gate_loss,
    layer_dropout_rates,
    token_cross_entropy,
)


@dataclass
class ObjectiveOutput(ModelOutput):
    """Loss of one micro-batch and sums for logging.

    Attributes:
        loss: scalar to differentiate, already divided by the number of target tokens.
        sums: named sums over target tokens (``loss/exit4``, ``agree/exit4``, ``tokens``), detached.
    """

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None


def _answer_positions(hidden: Tensor, predicts: Tensor) -> Tensor:
    """Rows ``[N, d]`` of ``[B, T, d]`` whose next token is a target."""
    return hidden[:, :-1][predicts]


class Objective(nn.Module):
    """Common part: exit states at target positions, and their logging sums."""

    # Read by Trainer: the losses come divided by the step's count of targets already.
    accepts_loss_kwargs = True

    def __init__(self, model: AdaptiveModel) -> None:
        super().__init__()
        self.model = model
        depth = model.backbone.num_layers
        self.names = [f"exit{layer}" for layer in (*model.exit_config.layers, depth)]

    @property
    def config(self) -> Any:
        """The wrapped transformers configuration, where Trainer looks for it."""
        return self.model.base.config

    def exit_states(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Normed hidden states ``[N, d]`` at each exit and the top, and targets ``[N]``."""
        labels = batch["labels"][:, 1:]
        predicts = labels != IGNORE_INDEX
        # Padding is on the right, where causality hides it: no mask keeps attention fast.
        states = self.model(batch["input_ids"], output_exit_states=True)
        norm = self.model.backbone.norm
        rows = [_answer_positions(h, predicts) for h in (*states.exits, states.last)]
        return [norm(row) for row in rows], labels[predicts]

    def log_sums(
        self, losses: Sequence[Tensor], tokens: Sequence[Tensor], targets: Tensor
    ) -> dict[str, Tensor]:
        """Sums by exit of loss, agreement with the top and hits of the target."""
        top = tokens[-1]
        sums: dict[str, Tensor] = {"tokens": torch.tensor(float(targets.numel()))}
        for name, loss, chosen in zip(self.names, losses, tokens, strict=True):
            sums[f"loss/{name}"] = loss.detach()
            sums[f"agree/{name}"] = (chosen == top).sum()
            sums[f"hit/{name}"] = (chosen == targets).sum()
        return sums


class PretrainObjective(Objective):
    """All exits trained jointly from scratch: LayerSkip's loss and layer dropout.

    Args:
        scale, early_scale: weights of the exits, see `exit_loss_weights`.
        layer_dropout: p_max of `layer_dropout_rates`; rows of a batch skip layers one by one.
        gate_weight: weight of the gates' loss; its gradient stops at the gate.
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
                layer.register_forward_hook(_row_dropout(rate))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch ``[B, T]``; `num_items_in_batch` is the step's count of targets."""
        states, targets = self.exit_states({"input_ids": input_ids, "labels": labels})
        exits, backbone = self.model.exits, self.model.backbone
        translated = [
            *(exits.translate(i, state) for i, state in enumerate(states[:-1])),
            states[-1],
        ]
        logits = [backbone.head_logits(state) for state in translated]
        losses = [token_cross_entropy(row, targets) for row in logits]
        chosen = [row.detach().argmax(dim=-1) for row in logits]
        total = sum(
            (w * loss for w, loss in zip(self.weights, losses, strict=True)),
            start=torch.zeros((), device=targets.device),
        )
        for i, state in enumerate(states[:-1]):
            agrees = chosen[i] == chosen[-1]
            total = total + self.gate_weight * gate_loss(
                exits.gate_logit(i, state.detach()), agrees
            )
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        return ObjectiveOutput(loss=total / count, sums=self.log_sums(losses, chosen, targets))


class HeadsObjective(Objective):
    """Backbone frozen; translators and gates learn to say what the last layer says.

    Per target token: ``kl_weight * KL(top || exit) + ce_weight * CE(exit, argmax of top)`` and the
    gates' loss, averaged over exits.
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
        num_items_in_batch: Tensor | int | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch ``[B, T]``; `num_items_in_batch` is the step's count of targets."""
        exits, backbone = self.model.exits, self.model.backbone
        with torch.no_grad():
            states, targets = self.exit_states({"input_ids": input_ids, "labels": labels})
            top = backbone.head_logits(states[-1])
        answer = top.argmax(dim=-1)
        losses, chosen = [], []
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
        losses.append(token_cross_entropy(top, targets))
        chosen.append(answer)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        total = total / (len(states) - 1)
        return ObjectiveOutput(loss=total / count, sums=self.log_sums(losses, chosen, targets))


def _row_dropout(rate: float) -> Any:
    """Forward hook that lets each row of a batch skip the layer with probability `rate`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not module.training:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        keep = torch.rand(hidden.shape[0], 1, 1, device=hidden.device) >= rate
        mixed = torch.where(keep, hidden, args[0])
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook
