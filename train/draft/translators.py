"""Translators of exits in closed form: ridge regression from an exit's state to the last one.

The map from the normed state at an exit to the normed state after the last layer that has the least
squared error on the model's own text (the tuned lens of Belrose et al., arXiv:2303.08112, without
training steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deliberate.modeling.exit_heads import ExitHeads
from deliberate.train.draft.hidden_cache import HiddenCache, Text
from deliberate.train.draft.ridge import Ridge


@dataclass(frozen=True)
class ExitAgreement:
    """What an exit's tokens are worth on held-out text.

    Attributes:
        layer: layers below the exit.
        agreement: share of tokens on which it chooses the full-depth token.
        threshold: least confidence at which so many agree as was asked for; infinite for none.
        exits: share of tokens that reach the threshold.
    """

    layer: int
    agreement: float
    threshold: float
    exits: float


@torch.no_grad()
def fit_translators(
    exits: ExitHeads,
    cache: HiddenCache,
    texts: Sequence[Text],
    norm: Callable[[Tensor], Tensor],
    *,
    penalty: float = 1e-3,
) -> None:
    """Sets the full-rank translators of all exits.

    Args:
        exits: with translators of the kind ``full``.
        cache: has the states after every exit and after the last layer.
        texts: to fit on; every position counts, prompts too.
        norm: the model's final norm.
    """
    top = cache.states(cache.layers[-1])
    for layer, translator in zip(exits.config.layers, exits.translators, strict=True):
        below = cache.states(layer)
        ridge = Ridge(cache.hidden_size, cache.hidden_size)
        for text in texts:
            rows = slice(text.start, text.start + text.length)
            ridge.add(norm(below[rows].float()), norm(top[rows].float()))
        weight: Tensor = translator.delta.weight  # type: ignore[assignment, union-attr]
        weight.copy_(ridge.solve(penalty) - torch.eye(cache.hidden_size))


@torch.inference_mode()
def measure_exits(
    exits: ExitHeads,
    cache: HiddenCache,
    texts: Sequence[Text],
    norm: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    full_head: Callable[[Tensor], Tensor] | None = None,
    *,
    target: float,
) -> list[ExitAgreement]:
    """Agreement of each exit with full depth on answers, and the threshold that reaches `target`.

    Args:
        head: normed states ``[n, d]`` -> logits ``[n, V']`` of the tokens of `exits.vocabulary`.
        full_head: the same of all tokens, for what full depth chooses; None: `head` is of all.
    """
    full_head = full_head or head
    top = cache.states(cache.layers[-1])
    found = []
    for index, layer in enumerate(exits.config.layers):
        below = cache.states(layer)
        agreed: list[Tensor] = []
        confident: list[Tensor] = []
        for text in texts:
            rows = slice(text.start + max(0, text.prompt - 1), text.start + text.length)
            wanted = full_head(norm(top[rows].float())).argmax(dim=-1)
            logits = head(exits.translate(index, norm(below[rows].float())))
            token, score = exits.measure.score(logits)
            if exits.vocabulary is not None:
                token = exits.vocabulary[token]
            agreed.append(token == wanted)
            confident.append(score)
        same, score = torch.cat(agreed), torch.cat(confident)
        threshold, share = threshold_for(same, score, target)
        found.append(ExitAgreement(layer, float(same.float().mean()), threshold, share))
    return found


def threshold_for(agreed: Tensor, scores: Tensor, target: float) -> tuple[float, float]:
    """The least score such that, of the tokens at or above it, a share `target` agreed.

    Returns:
        The threshold and the share of tokens that reach it; infinity and 0 where none does with at
        least 20 tokens.
    """
    order = scores.argsort(descending=True)
    counts = torch.arange(1, len(order) + 1)
    good = (agreed[order].cumsum(0) / counts >= target) & (counts >= 20)
    places = good.nonzero()
    if not len(places):
        return math.inf, 0.0
    last = int(places[-1])
    threshold = min(1.0, max(1e-6, float(scores[order[last]])))
    return threshold, float((scores >= threshold).float().mean())
