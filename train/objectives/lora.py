"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) trained together with the exits, by peft.

The stock weights stay frozen; adapters of the linear layers, translators and exit gates are trained
by the LayerSkip objective. A checkpoint is a merged model that loads as any other, and the adapter
alone in `adapter/`, from which a run resumes exactly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from deliberate.api.adapters import (
    ADAPTER,
    ADAPTER_FOLDER,
    ALL_LINEAR,
    adapter_layers,
    attach,
    read_adapter,
    save_adapter,
)
from deliberate.api.model import AdaptiveModel
from deliberate.installation import install_extra
from deliberate.train.curricula import DropoutSchedule, ExitCurriculum
from deliberate.train.losses import ExitScale
from deliberate.train.objectives.base import Recipe
from deliberate.train.objectives.layerskip import LayerSkipObjective
from deliberate.train.saving import whole_state
from deliberate.train.setting_checks import check_choice, check_number, check_whole
from deliberate.utils.errors import DeliberateError


class Saving(StrEnum):
    """What a finished run keeps."""

    MERGED = "merged"
    ADAPTER = "adapter"


class LoraObjective(LayerSkipObjective):
    """LayerSkip's loss with the backbone frozen but for low-rank adapters.

    Args:
        rank, alpha, dropout, targets: of the adapters, see `attach`; an update is scaled by
            alpha / rank.
        save: what a finished run keeps: a ``merged`` model, or the ``adapter`` as well.
        scale and the rest: as in `LayerSkipObjective`.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        rank: int = 8,
        alpha: int = 16,
        dropout: float = 0.0,
        targets: str | Sequence[str] = ALL_LINEAR,
        save: Saving | str = Saving.MERGED,
        scale: ExitScale | str = ExitScale.LINEAR,
        early_scale: float = 0.5,
        layer_dropout: float = 0.0,
        gate_weight: float = 0.1,
        curriculum: ExitCurriculum | str = ExitCurriculum.ALL,
        rotation: int = 2,
        gradual_share: float = 0.5,
        dropout_schedule: DropoutSchedule | str = DropoutSchedule.CONSTANT,
    ) -> None:
        tuner = attach(model, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
        super().__init__(
            model,
            scale=scale,
            early_scale=early_scale,
            layer_dropout=layer_dropout,
            gate_weight=gate_weight,
            curriculum=curriculum,
            rotation=rotation,
            gradual_share=gradual_share,
            dropout_schedule=dropout_schedule,
        )
        self.saving = Saving(save)
        # In a tuple nn.Module does not see it: its parameters are the base model's already.
        self._tuner = (tuner,)

    def plain_state(self) -> dict[str, Tensor]:
        """The adaptive model's state with the adapters added into the weights they adapt."""
        state = whole_state(self.model)
        for name, layer in adapter_layers(self.model.base).items():
            state[f"base.{name}.base_layer.weight"] = (
                state[f"base.{name}.base_layer.weight"] + _delta(layer)
            ).detach()
        return {
            name.replace(".base_layer.", "."): value
            for name, value in state.items()
            if ".lora_" not in name
        }

    @property
    def writes_extra(self) -> bool:
        """Whether the adapter was asked for."""
        return self.saving is Saving.ADAPTER

    def save_extra(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Writes `adapter/` in peft's form, with the exits.

        Args:
            folder: of the checkpoint or the run.
            state: the adaptive model's gathered state.
        """
        adapter = self._tuner[0].peft_config[ADAPTER]
        save_adapter(folder / ADAPTER_FOLDER, state, adapter, self.model.exit_config)

    def load_extra(self, folder: Path) -> dict[str, Tensor]:
        """Adapters and exits of a checkpoint, in the names of the adaptive model in training."""
        return read_adapter(folder / ADAPTER_FOLDER)


def _delta(layer: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    if isinstance(layer.lora_A[ADAPTER].weight, DTensor):
        a, b = (
            layer.lora_A[ADAPTER].weight.full_tensor(),
            layer.lora_B[ADAPTER].weight.full_tensor(),
        )
        update = (b @ a) * layer.scaling[ADAPTER]
        return update.T if layer.fan_in_fan_out else update
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    return delta


def check_adapters(cfg: DictConfig) -> None:
    """The adapters' settings, and that peft is installed."""
    check_whole(cfg, "recipe.rank", least=1)
    check_whole(cfg, "recipe.alpha", least=1)
    check_number(cfg, "recipe.dropout", "within [0, 1)", lambda value: 0 <= value < 1)
    check_choice(cfg, "recipe.save", [str(member) for member in Saving])
    if importlib.util.find_spec("peft") is None:
        raise DeliberateError(f"recipe=lora needs the package `peft`: {install_extra('lora')}")


RECIPE = Recipe(LoraObjective, check=check_adapters)
