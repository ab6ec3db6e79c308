"""Closed-form repair of a student made from some of its teacher's layers, before any training.

Behind a gap the student's states are not those that the next layer was trained on. Each layer that
is kept stands for itself and the dropped ones after it; its last matrix, the MLP's ``down_proj``,
is solved for anew so that the state behind it is nearest to the teacher's behind the last of
these layers. Linear maps in place of dropped layers, folded into the matrix before them, are
ReplaceMe's (arXiv:2505.02819); here the whole matrix is solved for, and layer after layer, so
that each sees what the repaired layers before it give. One pass over a few thousand tokens does it,
where gradient steps need many times as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deliberate.modeling.backbone import Backbone
from deliberate.utils.devices import use_bf16
from deliberate.utils.errors import DeliberateError

RIDGE = 0.03
"""Pull towards the matrices as they were, as a share of the mean square of their inputs."""


def last_product(layer: nn.Module) -> nn.Linear:
    """The last matrix of a layer's MLP.

    Raises:
        DeliberateError: the layer has none under Llama's name.
    """
    found = getattr(getattr(layer, "mlp", None), "down_proj", None)
    if not isinstance(found, nn.Linear):
        raise DeliberateError(
            f"model.fit_tokens: a {type(layer).__name__} has no mlp.down_proj to solve for; leave "
            "model.fit_tokens out"
        )
    return found


@torch.no_grad()
def fit_layers(
    student: Any,
    teacher: Any,
    kept: Sequence[int],
    texts: Sequence[Sequence[int]],
    ridge: float = RIDGE,
) -> list[float]:
    """Solves for the last matrix of every kept layer of `student`, in place.

    Args:
        student: has the layers `kept` of `teacher`, numbered from 1.
        texts: token ids; states of all their positions count alike. The first position's, a sink
            of attention, is many times as large as the others' and so is met almost exactly.
        ridge: see `RIDGE`; at least 0.

    Returns:
        Of each layer, the squared distance of the states (but the first ones) from the teacher's
        after the solution, divided by that before it; 1 where there is none to mend.
    """
    own, whole = Backbone(student), Backbone(teacher)
    ends = [*(one - 1 for one in kept[1:]), whole.num_layers]
    wanted, held = embedded(whole, texts), embedded(own, texts)
    later = not_first(texts)
    left, start = [], 0
    for number, end in enumerate(ends):
        wanted = [states_behind(whole, states, start, end) for states in wanted]
        product = last_product(own.layers[number])
        with inputs_of(product) as inputs:
            held = [states_behind(own, states, number, number + 1) for states in held]
        # What the matrix should have added beyond what it did.
        missing = torch.cat([(a - b)[0] for a, b in zip(wanted, held, strict=True)]).float()
        values = torch.cat([one[0] for one in inputs]).float()
        gram = values.T @ values
        gram.diagonal().add_(ridge * mean_square(values[later]))
        change = torch.linalg.solve(gram, values.T @ missing)
        before = float(missing[later].square().sum())
        rest = float((missing - values @ change)[later].square().sum())
        left.append(rest / before if before else 1.0)
        product.weight += change.T.to(product.weight)
        held = [
            states + (one.float() @ change).to(states)
            for states, one in zip(held, inputs, strict=True)
        ]
        start = end
    return left


def embedded(backbone: Backbone, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """States ``[1, n, d]`` of each text before the first layer."""
    rows = [torch.tensor([list(ids)]) for ids in texts]
    return [backbone.embed(row, backbone.context(0, row.shape[1], device="cpu")) for row in rows]


def not_first(texts: Sequence[Sequence[int]]) -> Tensor:
    """``[n]`` bool over all positions of all texts, False at the first one of each."""
    return torch.cat([torch.arange(len(ids)) > 0 for ids in texts])


def mean_square(values: Tensor) -> float:
    """Sum of the squares of inputs ``[n, K]``, on average over the K: the scale of a pull.

    Give it positions but the first: where a sink of attention is made, its input outweighs all.
    """
    return float(values.square().sum()) / values.shape[1]


def states_behind(backbone: Backbone, states: Tensor, first: int, last: int) -> Tensor:
    """States ``[1, n, d]`` behind layers first..last-1, by bfloat16 where that is fast."""
    count = states.shape[1]
    cache, ctx = backbone.new_cache(count), backbone.context(0, count, device=states.device)
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16("auto")):
        return backbone.run_layers(states, first, last, ctx, cache)


@contextmanager
def inputs_of(product: nn.Linear) -> Iterator[list[Tensor]]:
    """The inputs that a linear module gets while the block runs."""
    seen: list[Tensor] = []
    handle = product.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()
