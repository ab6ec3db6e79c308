"""The recipes by name, and what model each starts from."""

from __future__ import annotations

from collections.abc import Mapping

from deliberate.train.objectives.base import HeadsObjective, Objective, PretrainObjective
from deliberate.train.objectives.deliberation_gate import GateObjective
from deliberate.train.objectives.layerskip import DistillObjective, LayerSkipObjective
from deliberate.train.objectives.lora import LoraObjective

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
