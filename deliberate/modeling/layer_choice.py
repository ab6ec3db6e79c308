"""Which of a model's layers a student keeps: the cheapest cut of its depth into segments.

A student's layer stands for itself and the dropped ones after it, its MLP's last matrix solved for
anew (`deliberate.modeling.layer_fit`). What that costs is measured for every segment by itself: the
layers of the whole model run up to it, the repaired layer in place of the segment, the layers
above it as they are; the divergence of what comes out from the whole model's distribution.
The costs of segments add up nearly enough, so the best layers for every number of them follow by
dynamic programming, as the best blocks to merge do in LaCo's and ReplaceMe's searches
(arXiv:2402.11187, arXiv:2505.02819), but over all cuts at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.modeling.backbone import Backbone
from deliberate.modeling.layer_fit import (
    RIDGE,
    embedded,
    inputs_of,
    last_product,
    mean_square,
    states_behind,
)
from deliberate.utils.errors import DeliberateError

Text = tuple[Sequence[int], Sequence[int]]
"""Token ids: of a prompt of at least one token, and of an answer."""

Costs = Mapping[tuple[int, int], float]
"""Of segments (first layer, last layer), numbered from 1: nats a token that it costs to leave the
first layer alone, fitted, in place of them all."""

# Every so many positions of a judged answer are read: a head is as dear as several layers.
_STRIDE = 2


@torch.inference_mode()
def segment_costs(
    model: Any,
    texts: Sequence[Sequence[int]],
    judged: Sequence[Text],
    *,
    most: int,
    ridge: float = RIDGE,
    tell: Callable[[str], None] = lambda _line: None,
) -> dict[tuple[int, int], float]:
    """What every segment of 2 to `most` layers costs, in nats a token of divergence.

    Args:
        model: the whole model.
        texts: token ids that the layers are fitted on; their states behind every layer are kept,
            4 bytes * layers * hidden size a token.
        judged: texts that are not among them.
        most: layers of a segment, at least 2.
        ridge: see `deliberate.modeling.layer_fit.RIDGE`.
        tell: gets a line after every layer.
    """
    whole = Backbone(model)
    depth = whole.num_layers
    states = [_all_states(whole, ids) for ids in texts]
    rows = [_all_states(whole, [*prompt, *answer]) for prompt, answer in judged]
    wanted = [_shares(whole, own[depth], one) for own, one in zip(rows, judged, strict=True)]
    later = torch.cat([torch.arange(len(ids)) > 0 for ids in texts])
    costs: dict[tuple[int, int], float] = {}
    for first in range(depth - 1):
        inputs, behind = _layer(whole, first, states)
        added, ends = _layer(whole, first, rows)
        values = torch.cat([one[0] for one in inputs]).float()
        gram = values.T @ values
        gram.diagonal().add_(ridge * mean_square(values[later]))
        factor = torch.linalg.cholesky(gram)
        own = torch.cat([one[0] for one in behind])
        for last in range(first + 1, min(depth, first + most)):
            target = torch.cat([every[last + 1][0] for every in states])
            change = torch.cholesky_solve(values.T @ (target - own), factor)
            total, count = 0.0, 0
            for number, text in enumerate(judged):
                hidden = ends[number] + added[number].float() @ change
                if last + 1 < depth:
                    hidden = states_behind(whole, hidden, last + 1, depth)
                shares, known = _shares(whole, hidden, text), wanted[number]
                total += float((known.exp() * (known - shares)).sum())
                count += len(known)
            costs[first + 1, last + 1] = total / count
        tell(f"layer {first + 1} of {depth}: what it can stand for is measured")
    return costs


def best_layers(costs: Costs, num_layers: int, count: int) -> tuple[list[int], float]:
    """The `count` layers to keep that cost least together, numbered from 1, and that cost in nats.

    Raises:
        DeliberateError: too few for segments as long as those that were measured.
    """
    # By layers covered and layers kept: the least cost, and the layers.
    found: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for end in range(1, num_layers + 1):
        for kept in range(1, min(end, count) + 1):
            best: tuple[float, list[int]] | None = None
            for first in range(end, 0, -1):
                cost = 0.0 if first == end else costs.get((first, end), math.inf)
                before = found.get((first - 1, kept - 1))
                if before is None or cost == math.inf:
                    continue
                if best is None or before[0] + cost < best[0]:
                    best = before[0] + cost, [*before[1], first]
            if best is not None:
                found[end, kept] = best
    if (num_layers, count) not in found:
        raise DeliberateError(
            f"{count} layers cannot stand for {num_layers}: keep more, or let one stand for more"
        )
    cost, layers = found[num_layers, count]
    return layers, cost


def _all_states(whole: Backbone, ids: Sequence[int]) -> list[Tensor]:
    """States ``[1, n, d]`` of a text: the embedding, and behind every layer."""
    states = embedded(whole, [ids])
    for number in range(whole.num_layers):
        states.append(states_behind(whole, states[-1], number, number + 1))
    return states


def _layer(
    whole: Backbone, number: int, states: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """What a layer's last matrix gets on every text, and the states behind the layer."""
    with inputs_of(last_product(whole.layers[number])) as inputs:
        behind = [states_behind(whole, own[number], number, number + 1) for own in states]
    return inputs, behind


def _shares(whole: Backbone, states: Tensor, text: Text) -> Tensor:
    """Logarithms of the probabilities at some positions of the answer, ``[n, V]``."""
    rows = states[0, len(text[0]) - 1 : -1 : _STRIDE]
    found: Tensor = whole.head_logits(whole.norm(rows)).float().log_softmax(-1)
    return found
