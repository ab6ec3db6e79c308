"""Rows of a model's head: those of a draft vocabulary."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deliberate.modeling.block_modules import BlockLinear
from deliberate.utils.errors import DeliberateError


def times_rows(lm_head: Any, normed: Tensor, rows: Tensor) -> Tensor:
    """A linear head's products with states ``[..., d]`` for some tokens: ``[..., len(rows)]``."""
    bias = None if lm_head.bias is None else lm_head.bias[rows]
    return nn.functional.linear(normed, lm_head.weight[rows], bias)


def head_rows(lm_head: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows ``[V', d]`` of a head and of its bias, float32 where the head is kept in blocks.

    Raises:
        DeliberateError: a head without a matrix of floats, such as a quantised one, or with fewer
            rows.
    """
    last, rows_there = int(ids[-1]), getattr(lm_head, "out_features", None)
    if rows_there is not None and last >= rows_there:
        raise DeliberateError(
            f"the exits choose among tokens up to {last}, and the head has {rows_there} rows: "
            "they are of another model"
        )
    if isinstance(lm_head, BlockLinear):
        rows = lm_head.blocks.widen(ids.tolist())
    elif isinstance(lm_head, nn.Linear) and type(lm_head.weight) is nn.Parameter:
        rows = lm_head.weight.detach()[ids.to(lm_head.weight.device)]
    else:
        raise DeliberateError(
            f"the exits read {len(ids)} rows of the head, and the head is a "
            f"{type(lm_head).__name__} without a matrix of floats: load the model unquantised"
        )
    bias = getattr(lm_head, "bias", None)
    return rows, None if bias is None else bias.detach()[ids.to(bias.device)]
