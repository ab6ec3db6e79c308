"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) on a base model, by peft; and their
folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deliberate.api import checkpoint
from deliberate.installation import install_extra
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read, read_json

ADAPTER_FOLDER = "adapter"
ALL_LINEAR = "all-linear"
ADAPTER = "default"  # the name that peft gives the one adapter
WEIGHTS_NAME = "adapter_model.safetensors"
# How peft names the tensors of its own folders.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class _AdapterFile:
    """What loading needs of peft's `adapter_config.json`."""

    base_model_name_or_path: str
    target_modules: list[str] | str
    r: int
    lora_alpha: int


def attach(
    model: ModelView, *, rank: int, alpha: int, dropout: float, targets: str | Sequence[str]
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
        return LoraModel(model.base, config, ADAPTER)
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


def save_adapter(
    folder: Path, state: Mapping[str, Tensor], adapter: Any, exits: ExitConfig
) -> None:
    """Writes an adapter in peft's form with the exits beside it; `load_adapter` reads it.

    Args:
        folder: made where it is not there.
        state: of the adaptive model with the adapters in it.
        adapter: peft's configuration of them.
        exits: of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {
        PREFIX + name.removeprefix("base.").replace(f".{ADAPTER}.", "."): _plain(value)
        for name, value in state.items()
        if ".lora_" in name
    }
    heads = {
        n.removeprefix("exits."): _plain(v) for n, v in state.items() if n.startswith("exits.")
    }
    save_file(adapters, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    save_file(heads, folder / checkpoint.EXITS_NAME, metadata={"format": "pt"})
    adapter.save_pretrained(str(folder))
    text = json.dumps(exits.to_dict(), indent=2) + "\n"
    write_text(folder / checkpoint.ADAPTER_EXITS_NAME, text)


def _plain(value: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share memory.
    return value.detach().cpu().contiguous().clone()


def read_adapter(folder: Path) -> dict[str, Tensor]:
    try:
        adapter = load_file(folder / WEIGHTS_NAME)
        exits = load_file(folder / checkpoint.EXITS_NAME)
    except (OSError, SafetensorError) as error:
        raise DeliberateError(
            f"{folder} holds no adapter and exits that can be read: {str(error).splitlines()[0]}"
        ) from None
    state = {f"exits.{name}": value for name, value in exits.items()}
    for name, value in adapter.items():
        stem, _, last = name.removeprefix(PREFIX).rpartition(".")
        state[f"base.{stem}.{ADAPTER}.{last}"] = value
    return state


def load_adapter(
    make: Callable[..., Any],
    folder: str | Path,
    *,
    settings_of_model: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The adaptive model of an `adapter/` folder: its base checkpoint with the adapter merged.

    `AdaptiveModel.from_pretrained` comes here for such a folder.

    Args:
        make: `AdaptiveModel`.
        folder: what `LoraObjective.save_extra` wrote.
        settings_of_model: of `AdaptiveModel`: fidelity, executor and the like.
        **kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        DeliberateError: a missing file, or a base model that the adapter does not fit.
    """
    source = Path(folder)
    if not (source / checkpoint.ADAPTER_EXITS_NAME).is_file():
        raise DeliberateError(
            f"{source} is a PEFT adapter without exits: merge it into its base model "
            "(PeftModel.merge_and_unload), save that, and load the result"
        )
    settings = read(_AdapterFile, source / checkpoint.ADAPTER_NAME, others="ignore")
    exits = read_json(source / checkpoint.ADAPTER_EXITS_NAME)
    base = checkpoint.load_base(checkpoint.resolve(settings.base_model_name_or_path), **kwargs)
    config = ExitConfig.from_dict(exits, num_layers=base.config.num_hidden_layers)
    model = make(base.eval(), config, executor="generic")
    targets = settings.target_modules
    tuner = attach(
        model,
        rank=settings.r,
        alpha=settings.lora_alpha,
        dropout=0.0,
        targets=targets if isinstance(targets, str) else sorted(targets),
    )
    unknown = model.load_state_dict(read_adapter(source), strict=False).unexpected_keys
    if unknown:
        raise DeliberateError(f"{source} does not fit its base model: {unknown[0]} has no place")
    tuner.merge_and_unload()
    if not settings_of_model:
        return model
    # Anew, since an executor of its own takes its weights when it is made.
    made = make(model.base, config, **settings_of_model)
    made.exits.load_state_dict(model.exits.state_dict())
    return made
