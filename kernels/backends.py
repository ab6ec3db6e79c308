"""Which kernel runs each op here, and the environment report with that in it."""

from __future__ import annotations

from typing import Any

import torch

from deliberate.kernels.registry import KERNELS
from deliberate.utils import environment
from deliberate.utils.errors import DeliberateError


def kernel_backends() -> dict[str, str]:
    """By op of `deliberate.kernels`, the backend that runs here and what else there is.

    For bfloat16 on a GPU, for float32 on a CPU; an override by ``DELIBERATE_KERNELS`` is followed,
    and one that names nothing is said in place of the choice.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
        choices = KERNELS.choices("cuda" if on_gpu else "cpu", dtype)
    except DeliberateError as error:
        return {"error": str(error)}
    return {op: f"{one} (of {', '.join(known)})" for op, (one, known) in choices.items()}


def describe() -> dict[str, Any]:
    """`environment.describe` and the kernels that run here, JSON-ready."""
    facts = environment.describe()
    facts["kernels"] = kernel_backends()
    return facts
