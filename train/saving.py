"""The model in training as a plain one: tensors gathered, adapters merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from deliberate.api.model import AdaptiveModel


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether any parameter is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole; every process must take part where it is sharded."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }


def plain_copy(model: AdaptiveModel, state: Mapping[str, Tensor]) -> AdaptiveModel:
    """A new adaptive model on the CPU of the same configuration with these weights.

    Args:
        state: in the names of an adaptive model without adapters (``base. ...``, ``exits. ...``).
    """
    config = copy.deepcopy(model.base.config)
    with torch.random.fork_rng():  # its first weights are drawn, and then overwritten
        base = AutoModelForCausalLM.from_config(
            config, dtype=model.base.dtype, attn_implementation=config._attn_implementation
        )
        new = AdaptiveModel(base, model.exit_config, fidelity=model.fidelity, executor="generic")
        if model.gate is not None:
            new.attach_gate(model.gate.config)
    new.load_state_dict({name: value.detach().cpu() for name, value in state.items()})
    base.generation_config = copy.deepcopy(model.base.generation_config)
    return new.eval()
