"""A shallower model from some of a checkpoint's layers, as the start of a student."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError


def check_kept(layers: object, num_layers: int, path: str) -> None:
    """Raises DeliberateError unless `layers` are ascending numbers from 1 to `num_layers`."""
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise DeliberateError(f"model.keep_layers={layers!r} must be a list, e.g. [1,2,4]")
    kept = list(layers)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in kept):
        raise DeliberateError(f"model.keep_layers={kept} must be whole numbers")
    outside = [one for one in kept if not 1 <= one <= num_layers]
    if outside:
        raise DeliberateError(
            f"model.keep_layers={kept}: {path} has layers 1 to {num_layers}, not {outside[0]}"
        )
    if kept != sorted(set(kept)):
        raise DeliberateError(f"model.keep_layers={kept} must ascend, each layer once")


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model with only the layers `kept` of `model`, numbered from 1; all else is the same.

    The start of a student in DistilBERT (arXiv:1910.01108) and in Minitron's depth pruning
    (arXiv:2408.11796). Weights are copied, dtype and attention are the model's.

    Raises:
        DeliberateError: an unsupported architecture, or layers whose kind depends on their number.
    """
    layers = Backbone(model).layers
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    config = _shallower(model.config, kept)
    with torch.random.fork_rng():  # its first weights are drawn, and then overwritten
        new = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    numbers = {str(one - 1): str(place) for place, one in enumerate(kept)}
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith(prefix):
            state[name] = value
            continue
        number, rest = name[len(prefix) :].split(".", 1)
        if number in numbers:
            state[f"{prefix}{numbers[number]}.{rest}"] = value
    try:
        new.load_state_dict(state)
    except RuntimeError:
        raise DeliberateError(
            f"model.keep_layers={list(kept)}: layers of {model.config.model_type!r} differ by "
            "their number, and these do not fit the new ones; keep others"
        ) from None
    new.generation_config = copy.deepcopy(model.generation_config)
    return new


def _shallower(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """The configuration of the kept layers; its lists by layer keep the entries of those."""
    new = copy.deepcopy(config)
    depth = config.num_hidden_layers
    new.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            setattr(new, name, [value[one - 1] for one in kept])
    return new
