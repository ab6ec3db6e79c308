"""The conditions of a chain of reasoning, as far as they are known where it is decoded."""

from __future__ import annotations

from typing import Any

from deliberate.api.decodable import DecodableModel
from deliberate.config import Fidelity
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.token_budget import BudgetSettings


def model_folder(model: DecodableModel) -> str:
    """The folder that the model was loaded from; empty: none."""
    return str(getattr(model.base.config, "_name_or_path", "") or "")


def chain_conditions(
    model: DecodableModel,
    marks: ReasoningMarks,
    limits: BudgetSettings,
    fidelity: Fidelity,
    *,
    sampled: bool,
) -> dict[str, Any]:
    """By the names of `deliberate.calibration.conditions`, as a chain's certificate states them.

    Exact mode decodes what dense decodes, so it counts as dense.
    """
    exact = fidelity is Fidelity.EXACT
    return {
        "max_new_tokens": limits.max_new_tokens,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "sampling": "sampled" if sampled else "greedy",
        "fidelity": "dense" if exact else str(fidelity),
        "handover": list(marks.handover),
        "answer_tokens": limits.answer,
    }
