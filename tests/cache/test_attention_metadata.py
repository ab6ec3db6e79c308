"""Positions, rotary tables and masks of a pass, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from deliberate.cache.attention_metadata import FULL, SLIDING, ContextBuilder
from deliberate.modeling.backbone import Backbone


def builder(**settings: Any) -> ContextBuilder:
    defaults = {"rope_follows_length": False, "eager": False, "window": None,
                "learned_positions": None}  # fmt: skip
    return ContextBuilder(nn.Embedding(7, 4), None, **defaults | settings)


def attends(mask: torch.Tensor) -> list[list[int]]:
    """Keys that each query of the first row attends to."""
    seen = mask[0, 0] if mask.dtype is torch.bool else mask[0, 0] == 0
    return [torch.nonzero(row).reshape(-1).tolist() for row in seen]


@pytest.mark.parametrize("eager", [False, True])
def test_masks_of_consecutive_tokens_with_a_window_of_three(eager) -> None:
    ctx = builder(window=3, eager=eager).uniform(2, 2, device="cpu")
    assert ctx.positions.tolist() == [[2, 3]]
    assert attends(ctx.masks[FULL]) == [[0, 1, 2], [0, 1, 2, 3]]
    assert attends(ctx.masks[SLIDING]) == [[0, 1, 2], [1, 2, 3]]


def test_only_masks_that_sdpa_cannot_make_itself_are_built() -> None:
    plain, eager = builder(window=4), builder(window=4, eager=True)
    assert plain.uniform(0, 4, device="cpu").masks == {FULL: None, SLIDING: None}
    assert plain.uniform(3, 1, device="cpu").masks == {FULL: None, SLIDING: None}
    assert plain.uniform(4, 1, device="cpu").masks[FULL] is None
    assert attends(plain.uniform(4, 1, device="cpu").masks[SLIDING]) == [[1, 2, 3, 4]]
    assert attends(eager.uniform(0, 2, device="cpu").masks[FULL]) == [[0], [0, 1]]


def test_masks_of_rows_that_start_apart() -> None:
    holes = torch.zeros(2, 8, dtype=torch.bool)
    holes[0, 1] = True
    ctx = builder(window=3).ragged([0, 1], [3, 1], [1, 2], batch=2, device="cpu", holes=holes)
    assert ctx.positions.tolist() == [[3, 4], [1, 2]] and ctx.keys == 5 and ctx.rows is None
    assert attends(ctx.masks[FULL])[0] == [0, 2, 3]
    assert attends(ctx.masks[SLIDING])[0] == [2, 3]
    assert attends(ctx.masks[FULL][1:]) == [[0, 1], [0, 1, 2]]
    narrow = builder(window=5).ragged([1], [3], [2], batch=2, device="cpu")
    assert narrow.masks[SLIDING] is narrow.masks[FULL] and narrow.rows.tolist() == [1]
    windowed = builder(window=4).ragged([1], [3], [2], batch=2, device="cpu")
    assert attends(windowed.masks[SLIDING]) == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_padding_never_reads_past_the_table_of_learned_positions() -> None:
    ctx = builder(learned_positions=10).ragged([0, 1], [9, 2], [1, 4], batch=2, device="cpu")
    assert ctx.positions.tolist() == [[9, 9, 9, 9], [2, 3, 4, 5]]
    # The mask is over cache slots, which are not clamped: padding attends to its own slot too.
    assert attends(ctx.masks[FULL])[3] == list(range(13))


def test_tables_follow_the_dtype_of_the_model() -> None:
    class Rotary(nn.Module):
        def forward(self, like: torch.Tensor, positions: torch.Tensor):
            angles = positions.unsqueeze(-1).to(like.dtype)
            return angles.cos(), angles.sin()

    embedding = nn.Embedding(7, 4)
    made = ContextBuilder(embedding, Rotary(), rope_follows_length=False, eager=False,
                          window=None, learned_positions=None)  # fmt: skip
    assert made.uniform(3, 2, device="cpu").position_embeddings[0].dtype is torch.float32
    embedding.double()
    cos, sin = made.uniform(3, 2, device="cpu").position_embeddings
    angles = torch.tensor([[[3.0], [4.0]]], dtype=torch.float64)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())
    (cos, _) = made.ragged([0, 1], [5, 2], [1, 1], batch=2, device="cpu").position_embeddings
    assert torch.equal(cos, torch.tensor([[[5.0]], [[2.0]]], dtype=torch.float64).cos())


def test_a_device_by_name_and_as_an_object_share_one_table(monkeypatch) -> None:
    backbone = Backbone(tiny_model("llama"))
    built = []
    real = ContextBuilder._build_tables
    monkeypatch.setattr(
        ContextBuilder, "_build_tables", lambda self, *a: built.append(a) or real(self, *a)
    )
    for device in ("cpu", torch.device("cpu"), "cpu"):
        backbone.context(0, 4, device=device)
        backbone.contexts.rotary_tables(4, device)
    assert len(built) == 1
