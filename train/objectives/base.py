"""What a recipe optimises: a module around an adaptive model whose forward returns the loss.

The loss is computed inside `forward`, so that wrappers for several processes see every parameter
that takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX, Measure
from deliberate.kernels.ops.exit_head import top_probability
from deliberate.train.losses import (
    ExitScale,
    distillation_loss,
    exit_loss_weights,
    gate_loss,
    layer_dropout_rates,
    token_cross_entropy,
)
from deliberate.train.saving import whole_state


@dataclass
class ObjectiveOutput(ModelOutput):
    """Loss of one micro-batch and what is logged of it.

    Attributes:
        loss: scalar to differentiate, already divided by the number of target tokens.
        sums: named sums over target tokens (``loss/exit4``, ``agree/exit4``, ``tokens/exit4``),
            detached.
        measured: float32 ``[N, K, 2]``, confidence and agreement with the top of every exit; only
            where `Objective.measuring` is set.
    """

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None
    measured: Tensor | None = None


class Objective(nn.Module):
    """Common part: exit states at target positions, and what is logged of them.

    Attributes:
        measuring: compute `ObjectiveOutput.measured` too, and the losses of exits that the step
            does not train; the trainer sets it for the steps that it logs.
        step, steps: optimizer steps done and to do, kept by the trainer for what changes with time.
    """

    # Read by Trainer: the losses come divided by the step's count of targets already.
    accepts_loss_kwargs = True

    def __init__(self, model: AdaptiveModel) -> None:
        super().__init__()
        self.model = model
        depth = model.backbone.num_layers
        self.names = [f"exit{layer}" for layer in (*model.exit_config.layers, depth)]
        self.measuring = False
        self.step, self.steps = 0, 1

    @property
    def _no_split_modules(self) -> Any:
        """Classes of layers that sharding keeps whole, under the name where accelerate looks."""
        return self.model.base._no_split_modules

    @property
    def config(self) -> Any:
        """The wrapped transformers configuration, where Trainer looks for it."""
        return self.model.base.config

    def plain_state(self) -> dict[str, Tensor]:
        """The adaptive model's state as a model without adapters has it; taken by all processes."""
        return whole_state(self.model)

    @property
    def leaves_extra(self) -> bool:
        """Whether a finished run leaves what `save_extra` writes."""
        return False

    def save_extra(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Writes what a checkpoint of this recipe holds beside the model; `state` is whole."""

    def load_extra(self, folder: Path) -> dict[str, Tensor] | None:
        """The state to go on from, where it is not the checkpoint's model itself."""
        return None

    def exit_states(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Normed hidden states ``[N, d]`` at each exit and the top, and targets ``[N]``."""
        targets = labels[:, 1:]
        predicts = targets != IGNORE_INDEX
        # Padding is on the right, where causality hides it: no mask keeps attention fast.
        packed = {} if position_ids is None else {"position_ids": position_ids}
        states = self.model(input_ids, output_exit_states=True, **packed)
        norm = self.model.backbone.norm
        rows = [hidden[:, :-1][predicts] for hidden in (*states.exits, states.last)]
        return [norm(row) for row in rows], targets[predicts]

    def log_sums(
        self, losses: Sequence[Tensor | None], tokens: Sequence[Tensor | None], targets: Tensor
    ) -> dict[str, Tensor]:
        """Sums by exit of loss, agreement with the top and hits of the target.

        None stands for an exit that was not computed: it counts no tokens.
        """
        top = tokens[-1]
        assert top is not None  # the top is computed always
        nothing = torch.zeros((), device=targets.device)
        sums: dict[str, Tensor] = {"tokens": nothing + targets.numel()}
        for name, loss, chosen in zip(self.names, losses, tokens, strict=True):
            there = loss is not None and chosen is not None
            sums[f"tokens/{name}"] = nothing + (targets.numel() if there else 0)
            sums[f"loss/{name}"] = nothing if loss is None else loss.detach()
            sums[f"agree/{name}"] = nothing if chosen is None else (chosen == top).sum()
            sums[f"hit/{name}"] = nothing if chosen is None else (chosen == targets).sum()
        return sums

    def measure(self, states: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor | None:
        """Confidence and agreement of every exit, ``[N, K, 2]``, if this step is measured.

        Args:
            states: normed hidden states of the exits.
            logits: of the exits and the top.

        The confidence is the gate's where the exits decide by it, else the greatest probability.
        """
        if not self.measuring:
            return None
        by_gate = self.model.exit_config.measure is Measure.GATE
        answer = logits[-1].argmax(dim=-1)
        pairs = []
        with torch.no_grad():
            for index, state in enumerate(states):
                token, confidence = top_probability(logits[index].float())
                if by_gate:
                    confidence = torch.sigmoid(self.model.exits.gate_logit(index, state)).float()
                pairs.append(torch.stack([confidence, (token == answer).float()], dim=-1))
        return torch.stack(pairs, dim=1)


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
                layer.register_forward_hook(self._row_dropout(rate))

    def exit_weights(self) -> list[float]:
        """Weights of the exits and the top at this step; one of 0 is not computed."""
        return self.weights

    def dropout_scale(self) -> float:
        """Factor on the layer dropout rates at this step."""
        return 1.0

    def token_loss(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """What one exit, or the top, is trained on, summed over the tokens."""
        return token_cross_entropy(logits, targets)

    def teach(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
    ) -> Tensor | None:
        """Logits ``[N, V]`` of a teacher at the target positions, where the recipe has one."""
        return None

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
        teacher = self.teach(input_ids, labels, position_ids)
        states, targets = self.exit_states(input_ids, labels, position_ids)
        weights = self.exit_weights()
        top = backbone.head_logits(states[-1])
        answer = top.detach().argmax(dim=-1)
        total = weights[-1] * self.token_loss(top, targets, teacher)
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
                logits = backbone.head_logits(exits.translate(i, state))
            token = logits.detach().argmax(dim=-1)
            if trained:
                total = total + weights[i] * self.token_loss(
                    logits, targets, self.taught(teacher, top)
                )
                gate = gate_loss(exits.gate_logit(i, state.detach()), token == answer)
                total = total + self.gate_weight * gate
            losses.append(token_cross_entropy(logits.detach(), targets))
            chosen.append(token)
            if self.measuring:
                kept.append(logits.detach())
        sums = self.log_sums(
            [*losses, token_cross_entropy(top.detach(), targets)], [*chosen, answer], targets
        )
        if teacher is not None:
            sums["loss/teacher"] = token_cross_entropy(teacher, targets)
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        return ObjectiveOutput(
            loss=total / count,
            sums=sums,
            measured=self.measure([s.detach() for s in states[:-1]], [*kept, top.detach()]),
        )

    def taught(self, teacher: Tensor | None, top: Tensor) -> Tensor | None:
        """The logits that an exit learns from."""
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
