"""FSDP2 (`torch.distributed.fsdp.fully_shard`) through accelerate's configuration, CPUs included.

accelerate shards on GPUs and silently falls back to DDP on CPUs. Here its FSDP plugin is set on
CPUs too, so that a sharded run can be tried on two CPU processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from deliberate.utils.errors import DeliberateError

FSDP_ARGUMENTS: Mapping[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    # Gathered, so that a run can be resumed with another number of processes.
    "state_dict_type": "FULL_STATE_DICT",
}


def wants_sharding(setting: bool) -> bool:
    """Whether the run shards: by its own setting, or launched so by accelerate."""
    return setting or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_on_cpus(accelerator: Accelerator, plugin_arguments: Mapping[str, Any] | None) -> bool:
    """Sets the FSDP plugin where accelerate did not; returns whether it was set.

    Args:
        plugin_arguments: those that Trainer made of its own arguments, or None to take the
            environment that ``accelerate launch`` sets.
    """
    state: Any = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin(**(plugin_arguments or {}))
    if plugin.fsdp_version != 2:
        raise DeliberateError("FSDP version 1 is not supported: set fsdp_version: 2 in accelerate")
    plugin.cpu_ram_efficient_loading = False
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return True


def load_whole_state(module: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """Loads a gathered state, which every process has read, into a module that may be sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=strict)
    with torch.no_grad():
        set_model_state_dict(module, state, options=options)
