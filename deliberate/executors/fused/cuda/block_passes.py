"""Passes over a cache in blocks: by the ops through its tables, or over keys gathered first.

Gathered keys go through torch's attention: for prompts, which are bound by arithmetic, and for
passes in which some slots hold nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deliberate.cache.attention_metadata import StepContext
from deliberate.executors.fused.cuda.block_cache import CudaBlockCache
from deliberate.executors.fused.cuda.workspaces import bucket
from deliberate.executors.fused.ops import fill_block, run_block
from deliberate.executors.fused.static_cache import HOLES, SLOTS


@torch.inference_mode()
def run_blocks(
    backbone: Any, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: CudaBlockCache
) -> Tensor:
    """As `Backbone.run_layers`.

    Args:
        backbone: the executor, a `CudaFusedBackbone` (which calls this, so it is not imported).
    """
    cache.begin(ctx, first, last)
    if first >= last:
        return hidden
    q = ctx.positions.shape[1]
    if backbone.few(ctx, q):
        rows, starts, counts = cache.pass_rows
        cache.place_tables()
        step = cache.workspace.step(bucket(q))
        step.put(first, hidden, rows)
        step.place(ctx.positions, rows, starts, counts)
        backbone.replay(cache.workspace, step, first, last)
        hidden = step.get(last, q, rows)
    else:
        slots = ctx.masks[SLOTS]
        assert slots is not None
        for layer in range(first, last):  # one at a time: its keys are held twice
            kv = cache.gathered(layer, len(slots))
            hidden = run_block(
                hidden, backbone.layer_weights[layer : layer + 1], [kv], ctx.positions,
                ctx.position_embeddings, slots, None, ctx.masks[HOLES],
                backbone.layer_shapes[layer : layer + 1], None,
            )  # fmt: skip
            cache.scatter(layer, *kv)
    cache.advance(ctx, first, last)
    return hidden


@torch.inference_mode()
def fill_blocks(
    backbone: Any, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: CudaBlockCache
) -> None:
    """As `Backbone.fill_layers`; arguments as for `run_blocks`."""
    cache.begin(ctx, first, last, write_only=True)
    slots = ctx.masks[SLOTS]
    assert slots is not None
    for layer in range(first, last):
        kv = cache.gathered(layer, len(slots))
        fill_block(
            hidden, backbone.layer_weights[layer : layer + 1], [kv], ctx.positions,
            ctx.position_embeddings, None, backbone.layer_shapes[layer : layer + 1], None,
        )  # fmt: skip
        cache.scatter(layer, *kv)
    cache.advance(ctx, first, last)
