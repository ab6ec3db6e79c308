"""The base class of training objectives: a module whose forward returns an adaptive model's loss.

The loss is computed inside `forward`, so that wrappers for several processes (DDP, FSDP) see every
parameter that takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.train.saving import whole_state

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class ObjectiveOutput(ModelOutput):
    """Loss of one micro-batch and what is logged of it.

    Attributes:
        loss: scalar to differentiate, already divided by the number of target tokens.
        sums: named sums over target tokens (``loss/exit4``, ``agree/exit4``, ``tokens/exit4``),
            detached.
        measured: float32 ``[N, K, 2]``, confidence of every exit and its agreement with the last
            layer's prediction; only where `Objective.measuring` is set.
    """

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None
    measured: Tensor | None = None


class Objective(nn.Module):
    """Base class: computes exit states at target positions and the figures that are logged.

    Attributes:
        measuring: compute `ObjectiveOutput.measured` too, and the losses of exits that the step
            does not train; the trainer sets it for the steps that it logs.
        step, steps: optimizer steps done and of the whole run, set by the trainer for schedules.
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
        """Classes of layers that FSDP does not split, under the name that accelerate reads."""
        return self.model.base._no_split_modules

    @property
    def config(self) -> Any:
        """The base model's configuration, under the name that Trainer reads."""
        return self.model.base.config

    def prepare(self, tokens: Collection[int] | None) -> None:
        """Called before training with the tokens of all training texts; None: not known."""

    def plain_state(self) -> dict[str, Tensor]:
        """The adaptive model's state with adapters merged; every process must call it."""
        return whole_state(self.model)

    @property
    def writes_extra(self) -> bool:
        """Whether a finished run keeps what `save_extra` writes."""
        return False

    def save_extra(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Writes what a checkpoint of this recipe holds beside the model; `state` is gathered."""

    def load_extra(self, folder: Path) -> dict[str, Tensor] | None:
        """The state to resume from, where it is not that of the checkpoint's model."""
        return None

    def exit_states(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Normed hidden states ``[N, d]`` at each exit and the last layer, and targets ``[N]``."""
        targets = labels[:, 1:]
        predicts = targets != IGNORE_INDEX
        # Padding is on the right, where causal attention does not see it: no mask is needed.
        packed = {} if position_ids is None else {"position_ids": position_ids}
        states = self.model(input_ids, output_exit_states=True, **packed)
        norm = self.model.backbone.norm
        rows = [hidden[:, :-1][predicts] for hidden in (*states.exits, states.last)]
        return [norm(row) for row in rows], targets[predicts]

    def log_sums(
        self, losses: Sequence[Tensor | None], tokens: Sequence[Tensor | None], targets: Tensor
    ) -> dict[str, Tensor]:
        """Sums by exit of loss, agreement with the last layer's prediction, and hits of the target.

        None: the exit was not computed and counts no tokens.
        """
        top = tokens[-1]
        assert top is not None  # the last layer is always computed
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
        """Confidence and agreement of every exit, ``[N, K, 2]``; None where `measuring` is off.

        Args:
            states: normed hidden states of the exits.
            logits: of the exits and the last layer.

        The confidence is that by which the exits decide.
        """
        if not self.measuring:
            return None
        measure = self.model.exits.measure
        answer = logits[-1].argmax(dim=-1)
        pairs = []
        with torch.no_grad():
            for index, state in enumerate(states):
                token, confidence = measure.score(logits[index].float())
                if measure.before_head:
                    confidence = torch.sigmoid(self.model.exits.gate_logit(index, state)).float()
                pairs.append(torch.stack([confidence, (token == answer).float()], dim=-1))
        return torch.stack(pairs, dim=1)


def no_check(_cfg: DictConfig) -> None:
    """The check of a recipe that has none of its own."""


@dataclass(frozen=True)
class Recipe:
    """What the registry (`deliberate.train.recipes`) knows of a recipe.

    Attributes:
        objective: called with the model and the settings of ``recipe`` in the configuration but
            ``name``; the parameters of its ``__init__`` are the settings that there are.
        from_scratch: may start from random weights.
        from_checkpoint: may start from a trained model.
        keeps_base: the base model's weights stay bit for bit as they are.
        check: raises DeliberateError where the recipe's own settings cannot work; it gets the whole
            configuration, before a model is loaded.
    """

    objective: type[Objective]
    from_scratch: bool = False
    from_checkpoint: bool = True
    keeps_base: bool = False
    check: Callable[[DictConfig], None] = no_check
