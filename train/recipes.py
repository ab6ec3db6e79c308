"""The recipes by name, and what model each starts from."""

from __future__ import annotations

from collections.abc import Mapping

from deliberate.train.gate_objective import GateObjective
from deliberate.train.layerskip import DistillObjective, LayerSkipObjective
from deliberate.train.lora import LoraObjective
from deliberate.train.objectives import HeadsObjective, Objective, PretrainObjective

OBJECTIVES: Mapping[str, type[Objective]] = {
    "pretrain": PretrainObjective,
    "heads": HeadsObjective,
    "layerskip": LayerSkipObjective,
    "lora": LoraObjective,
    "distill": DistillObjective,
    "gate": GateObjective,
}

FROM_SCRATCH = ("pretrain", "distill")
"""May start from random weights."""

FROM_CHECKPOINT = ("heads", "layerskip", "lora", "distill", "gate")
"""May start from a trained model."""
