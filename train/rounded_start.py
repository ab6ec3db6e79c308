"""Weights to start training under rounding from: rounded in closed form, outputs move least.

Rounding to nearest loses each weight by itself. Here the columns of a matrix are rounded one after
the other, and the error of each is taken up by the columns after it, by the inverse of the inputs'
second moments (GPTQ, Frantar et al., 2023, arXiv:2210.17323): the mean squared change of the
layer's outputs falls, with the same grid. The scale of a row is the one, of a few shares of its
largest weight, that loses least. Layer after layer, so that each sees what the rounded layers
before it give; an MLP's last matrix is first solved for anew (`deliberate.modeling.layer_fit`), so
that it takes up what the layers so far have lost.

What is kept is each weight as it was when its turn came, within the half step around its place on
the grid: rounding the result to nearest gives the matrix found, and training finds weights as near
to the next place as they are. Were they all on the grid, few would move in a short training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deliberate.executors.rounded_layers import ROW_GRIDS
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.layer_fit import (
    RIDGE,
    embedded,
    inputs_of,
    last_product,
    mean_square,
    not_first,
    states_behind,
)

DAMPING = 0.01
"""Added to the second moments' diagonal, as a share of its mean (GPTQ's own)."""
_SHARES = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
"""Of a row's largest weight: the scales that are tried."""
_BLOCK = 64
"""Columns whose errors reach the columns behind them in one product."""
_CELL = 0.45
"""Of a step: how far from its place on the grid a weight may stay."""


def round_in_order(weight: Tensor, moments: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A matrix on a grid of `bits` bits with one scale a row, its errors taken up as above.

    Args:
        weight: ``[N, K]``.
        moments: ``[K, K]``, sum of x x^T over the inputs.

    Returns:
        The rounded matrix, and weights that `deliberate.executors.rounded_layers.as_rounded` rounds
        to it: in every row one lies at the end of the grid, so the same grid is found. Both float32
        ``[N, K]``.
    """
    most = 2 ** (bits - 1) - 1
    work, gram = weight.detach().float().clone(), moments.float().clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    gram.diagonal().add_(DAMPING * float(gram.diagonal().mean()))
    largest, place = work.abs().max(dim=1)
    scale = _scales(work, gram.diagonal(), largest, most)
    ends = work.gather(1, place[:, None])[:, 0].sign() * most
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    found, kept = torch.empty_like(work), torch.empty_like(work)
    columns = work.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = work.new_empty((len(work), end - start))
        for column in range(start, end):
            own = work[:, column]
            steps = torch.where(place == column, ends, (own / scale).round().clamp(-most, most))
            found[:, column] = steps * scale
            near = (own / scale).clamp(-most, most).clamp(steps - _CELL, steps + _CELL) * scale
            kept[:, column] = torch.where(place == column, found[:, column], near)
            error = (own - found[:, column]) / inverse[column, column]
            work[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return found, kept


def _scales(weight: Tensor, weights: Tensor, largest: Tensor, most: int) -> Tensor:
    """Of every row the scale with the least squared error, inputs weighed by their moments."""
    best = torch.full_like(largest, torch.inf)
    chosen = torch.ones_like(largest)
    for share in _SHARES:
        scale = torch.where(largest > 0, largest * share / most, 1.0)[:, None]
        near = (weight / scale).round().clamp(-most, most) * scale
        lost = ((near - weight).square() * weights).sum(1)
        better = lost < best
        best, chosen = torch.where(better, lost, best), torch.where(better, scale[:, 0], chosen)
    return chosen


@torch.no_grad()
def start_rounded(
    model: Any,
    teacher: Any,
    texts: Sequence[Sequence[int]],
    grid: str,
    *,
    repair: bool = True,
    tell: Callable[[str], None] = lambda _line: None,
) -> None:
    """Replaces the weights of every linear module of the layers by rounded ones, in place.

    Args:
        model: in float, with the teacher's layers; not wrapped for rounding yet.
        teacher: the same in float, another object.
        texts: token ids.
        grid: of `deliberate.executors.rounded_layers.ROW_GRIDS`.
        repair: solve for an MLP's last matrix before it is rounded.
        tell: gets a line after every layer.
    """
    bits = ROW_GRIDS[grid]
    own, whole = Backbone(model), Backbone(teacher)
    kept: list[tuple[nn.Linear, Tensor]] = []
    held, wanted = embedded(own, texts), embedded(whole, texts)
    later = not_first(texts)
    for number, layer in enumerate(own.layers):
        wanted = [states_behind(whole, one, number, number + 1) for one in wanted]
        last = last_product(layer)
        # Modules that read the same input are rounded together, in the order in which they run.
        for group in _groups(layer, partial(states_behind, own, held[0], number, number + 1)):
            with inputs_of(group[0]) as inputs:
                behind = [states_behind(own, one, number, number + 1) for one in held]
            # The first position counts too: attention rests on its state, many times as large as
            # the others', and on the few weights that make it.
            values = torch.cat([one[0] for one in inputs]).float()
            moments = values.T @ values
            if repair and group[0] is last:
                missing = torch.cat([(a - b)[0] for a, b in zip(wanted, behind, strict=True)])
                last.weight += added(values[later], missing[later].float()).to(last.weight)
            sizes = [len(one.weight) for one in group]
            joined = torch.cat([one.weight for one in group])
            rounded, near = (m.split(sizes) for m in round_in_order(joined, moments, bits))
            for one, found, start in zip(group, rounded, near, strict=True):
                one.weight.copy_(found)
                kept.append((one, start))
        held = [states_behind(own, one, number, number + 1) for one in held]
        tell(f"layer {number + 1} of {own.num_layers} rounded in closed form")
    for module, start in kept:
        module.weight.copy_(start)


def added(values: Tensor, missing: Tensor) -> Tensor:
    """What a matrix should add, ``[N, K]``, so that its outputs for `values` gain `missing`.

    Without the first positions: their states are right but for what rounding costs, and so large
    that the matrix would be fitted to that alone (SmolLM2 at 4 bits: 0.64 nats a token, and 0.52
    without).

    Args:
        values: ``[n, K]``.
        missing: ``[n, N]``.
    """
    pulled = values.T @ values
    pulled.diagonal().add_(RIDGE * mean_square(values))
    return torch.linalg.solve(pulled, values.T @ missing).T


def _groups(layer: nn.Module, run: Callable[[], Any]) -> list[list[nn.Linear]]:
    """The layer's linear modules in the order in which they run, those of one input together."""
    seen: list[tuple[int, nn.Linear]] = []
    inputs: list[Tensor] = []
    handles = []
    for module in layer.modules():
        if isinstance(module, nn.Linear):

            def note(one: nn.Module, given: tuple[Tensor, ...]) -> None:
                inputs.append(given[0])  # else another input may get the same address
                assert isinstance(one, nn.Linear)
                seen.append((given[0].data_ptr(), one))

            handles.append(module.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, list[nn.Linear]] = {}
    for address, module in seen:
        groups.setdefault(address, []).append(module)
    return list(groups.values())
