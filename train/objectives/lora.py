"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) trained together with the exits, by peft.

The stock weights stay frozen; adapters of the linear layers, translators and gates learn by the
LayerSkip objective. A checkpoint is a merged model that can be loaded as it is, with the adapter
apart in `adapter/`, from which a run goes on exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deliberate.api import checkpoint as storage
from deliberate.api.model import AdaptiveModel
from deliberate.config import ExitConfig
from deliberate.installation import install_extra
from deliberate.train.curricula import DropoutSchedule, ExitCurriculum
from deliberate.train.losses import ExitScale
from deliberate.train.objectives.layerskip import LayerSkipObjective
from deliberate.train.saving import whole_state
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read, read_json

ADAPTER_FOLDER = "adapter"
ALL_LINEAR = "all-linear"
_NAME = "default"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", storage.ADAPTER_NAME
# How peft names the tensors of its own folders.
_PREFIX = "base_model.model."


class Saving(StrEnum):
    """What a finished run leaves."""

    MERGED = "merged"
    ADAPTER = "adapter"


def attach(
    model: AdaptiveModel, *, rank: int, alpha: int, dropout: float, targets: str | Sequence[str]
) -> Any:
    """Puts adapters into the base model, which is frozen, in place; returns peft's tuner.

    Args:
        targets: names of linear layers, or ``all-linear``: all but the head.

    Raises:
        DeliberateError: peft is missing, or the model has no such layers.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise DeliberateError(
            f"low-rank adapters need the package `peft`: {install_extra('lora')}"
        ) from None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        base_model_name_or_path=getattr(model.base.config, "_name_or_path", "") or None,
        task_type="CAUSAL_LM",
        # GPT-2 keeps its matrices the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.base.modules()),
    )
    try:
        return LoraModel(model.base, config, _NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise DeliberateError(f"recipe.targets={targets}: {reason}") from None


def adapter_layers(base: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {
        name: module
        for name, module in base.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


class LoraObjective(LayerSkipObjective):
    """LayerSkip's loss with the backbone frozen but for low-rank adapters.

    Args:
        rank, alpha, dropout, targets: of the adapters, see `attach`; an update is scaled by
            alpha / rank.
        save: what a finished run leaves: a ``merged`` model, or the ``adapter`` too, apart.
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
    def leaves_extra(self) -> bool:
        """Whether the adapter was asked for."""
        return self.saving is Saving.ADAPTER

    def save_extra(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Writes `adapter/` in peft's form, with the exits.

        Args:
            folder: of the checkpoint or the run.
            state: the adaptive model's whole state.
        """
        target = folder / ADAPTER_FOLDER
        target.mkdir(parents=True, exist_ok=True)
        adapter = {
            _PREFIX + name.removeprefix("base.").replace(f".{_NAME}.", "."): _plain(value)
            for name, value in state.items()
            if ".lora_" in name
        }
        exits = {
            n.removeprefix("exits."): _plain(v) for n, v in state.items() if n.startswith("exits.")
        }
        save_file(adapter, target / _WEIGHTS, metadata={"format": "pt"})
        save_file(exits, target / storage.EXITS_NAME, metadata={"format": "pt"})
        self._tuner[0].peft_config[_NAME].save_pretrained(str(target))
        config = self.model.exit_config.to_dict()
        write_text(target / storage.ADAPTER_EXITS_NAME, json.dumps(config, indent=2) + "\n")

    def load_extra(self, folder: Path) -> dict[str, Tensor]:
        """Adapters and exits of a checkpoint, in the names of the adaptive model in training."""
        return _read(folder / ADAPTER_FOLDER)


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        adapter = load_file(folder / _WEIGHTS)
        exits = load_file(folder / storage.EXITS_NAME)
    except (OSError, SafetensorError) as error:
        raise DeliberateError(
            f"{folder} holds no adapter and exits that can be read: {str(error).splitlines()[0]}"
        ) from None
    state = {f"exits.{name}": value for name, value in exits.items()}
    for name, value in adapter.items():
        stem, _, last = name.removeprefix(_PREFIX).rpartition(".")
        state[f"base.{stem}.{_NAME}.{last}"] = value
    return state


@dataclass(frozen=True)
class _AdapterFile:
    """What loading needs of peft's `adapter_config.json`."""

    base_model_name_or_path: str
    target_modules: list[str] | str
    r: int
    lora_alpha: int


def load_adapter(
    folder: str | Path, *, settings_of_model: Mapping[str, Any] | None = None, **kwargs: Any
) -> AdaptiveModel:
    """The adaptive model of an `adapter/` folder: its base checkpoint with the adapter merged.

    `AdaptiveModel.from_pretrained` comes here for such a folder.

    Args:
        folder: what `LoraObjective.save_extra` wrote.
        settings_of_model: of `AdaptiveModel`: fidelity, executor and the like.
        **kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        DeliberateError: a missing file, or a base model that the adapter does not fit.
    """
    source = Path(folder)
    settings = read(_AdapterFile, source / _CONFIG, others="ignore")
    exits = read_json(source / storage.ADAPTER_EXITS_NAME)
    base = storage.load_base(storage.resolve(settings.base_model_name_or_path), **kwargs)
    config = ExitConfig.from_dict(exits, num_layers=base.config.num_hidden_layers)
    model = AdaptiveModel(base.eval(), config, executor="generic")
    targets = settings.target_modules
    tuner = attach(
        model,
        rank=settings.r,
        alpha=settings.lora_alpha,
        dropout=0.0,
        targets=targets if isinstance(targets, str) else sorted(targets),
    )
    unknown = model.load_state_dict(_read(source), strict=False).unexpected_keys
    if unknown:
        raise DeliberateError(f"{source} does not fit its base model: {unknown[0]} has no place")
    tuner.merge_and_unload()
    if not settings_of_model:
        return model
    # Anew, since an executor of its own takes its weights when it is made.
    made = AdaptiveModel(model.base, config, **settings_of_model)
    made.exits.load_state_dict(model.exits.state_dict())
    return made


def _delta(layer: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    if isinstance(layer.lora_A[_NAME].weight, DTensor):
        a, b = layer.lora_A[_NAME].weight.full_tensor(), layer.lora_B[_NAME].weight.full_tensor()
        update = (b @ a) * layer.scaling[_NAME]
        return update.T if layer.fan_in_fan_out else update
    delta: Tensor = layer.get_delta_weight(_NAME)
    return delta


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()
