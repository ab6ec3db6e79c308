"""Solutions read behind their questions in one pass, and two models compared on the same texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deliberate.config import KVStorage
from deliberate.data.prompts import Example
from deliberate.eval.statistics import paired_accuracy, ratio_of_sums
from deliberate.modeling.backbone import Backbone


@dataclass(frozen=True)
class Read:
    """What a model makes of texts, one entry a text.

    Attributes:
        nll: mean negative log-likelihood of the solution's tokens, nats.
        choices: its most likely token at each of them, int64 ``[answer]``.
        hits: whether that is the solution's, bool ``[answer]``.
    """

    nll: list[float]
    choices: list[Tensor]
    hits: list[Tensor]

    @property
    def right(self) -> list[bool]:
        """Texts whose every token it chooses: greedy decoding would write them."""
        return [bool(one.all()) for one in self.hits]


@dataclass(frozen=True)
class Row:
    """One variant beside the float model.

    Attributes:
        bytes: of weights that a token reads.
        agreement: share of tokens with the same choice.
        nll, nll_change, nll_interval: mean, difference from float and its 95 % interval, paired.
        tokens_right, tokens_change, tokens_interval: share of the solutions' tokens that are its
            choice, the difference from float and its 95 % interval over texts.
        right, lost, gained: texts whose every token it would have chosen; those that float alone
            or it alone has so.
        right_interval: 95 % interval of the difference of the shares of these texts (Newcombe).
        cache_bytes: of the keys and values of one token; None where nobody asked.
        ms: median of a decoding step; None where it was not timed.
        speed: float's time divided by its own, with its interval.
    """

    bytes: int
    agreement: float
    nll: float
    nll_change: float
    nll_interval: tuple[float, float]
    tokens_right: float
    tokens_change: float
    tokens_interval: tuple[float, float]
    right: int
    lost: int
    gained: int
    right_interval: tuple[float, float]
    cache_bytes: int | None = None
    ms: float | None = None
    speed: float | None = None
    speed_interval: tuple[float, float] | None = None


@torch.inference_mode()
def read(
    backbone: Backbone, texts: Sequence[Example], storage: KVStorage = KVStorage.NATIVE
) -> Read:
    """What a model makes of each solution behind its question, in one pass a text."""
    every = [last_states(backbone, text, storage) for text in texts]
    return read_from(backbone, texts, every, backbone.num_layers)


@torch.inference_mode()
def last_states(
    backbone: Backbone,
    text: Example,
    storage: KVStorage = KVStorage.NATIVE,
) -> Tensor:
    """States ``[1, T, d]`` behind the last layer."""
    ids = torch.tensor([text.prompt + text.answer])
    count = ids.shape[1]
    ctx = backbone.context(0, count, device=backbone.device)
    cache = backbone.cache_maker(storage)(count, 1)
    return backbone.run_layers(backbone.embed(ids, ctx), 0, backbone.num_layers, ctx, cache)


@torch.inference_mode()
def every_state(backbone: Backbone, text: Example) -> list[Tensor]:
    """States ``[1, T, d]`` before each layer and behind the last."""
    ids = torch.tensor([text.prompt + text.answer])
    ctx = backbone.context(0, ids.shape[1], device=backbone.device)
    cache = backbone.cache_maker(KVStorage.NATIVE)(ids.shape[1], 1)
    states = [backbone.embed(ids, ctx)]
    for layer in range(backbone.num_layers):
        states.append(backbone.run_layers(states[-1], layer, layer + 1, ctx, cache))
    return states


@torch.inference_mode()
def read_from(
    backbone: Backbone, texts: Sequence[Example], states: Sequence[Tensor], layer: int
) -> Read:
    """As `read`, given the states ``[1, T, d]`` of each text before `layer`.

    Layers below it are not run, as where they are those that the states are from.
    """
    nll, choices, hits = [], [], []
    for text, before in zip(texts, states, strict=True):
        count = before.shape[1]
        if layer < backbone.num_layers:
            ctx = backbone.context(0, count, device=backbone.device)
            cache = backbone.cache_maker(KVStorage.NATIVE)(count, 1)
            before = backbone.run_layers(before, layer, backbone.num_layers, ctx, cache)
        logits = backbone.read_full_depth(before[0, len(text.prompt) - 1 : -1]).logits.float()
        target = torch.tensor(text.answer)
        chosen = logits.log_softmax(-1).gather(1, target[:, None])
        nll.append(-float(chosen.mean()))
        choices.append(logits.argmax(-1))
        hits.append(choices[-1] == target)
    return Read(nll, choices, hits)


def agreement(found: Read, reference: Read) -> float:
    """Share of tokens of all texts that both choose."""
    same = [one == other for one, other in zip(found.choices, reference.choices, strict=True)]
    return float(torch.cat(same).double().mean())


def compared(found: Read, reference: Read, held: int) -> Row:
    """A variant beside the float model, text by text."""
    change = np.asarray(found.nll) - np.asarray(reference.nll)
    draws = np.random.default_rng(0).integers(0, len(change), (2000, len(change)))
    low, high = np.percentile(change[draws].mean(axis=1), [2.5, 97.5])
    gained = [
        int(one.sum()) - int(other.sum())
        for one, other in zip(found.hits, reference.hits, strict=True)
    ]
    tokens = ratio_of_sums(gained, [len(one) for one in found.hits])
    texts = paired_accuracy(found.right, reference.right)
    over = tokens.interval
    return Row(
        bytes=held,
        agreement=agreement(found, reference),
        nll=statistics.fmean(found.nll),
        nll_change=float(change.mean()),
        nll_interval=(float(low), float(high)),
        tokens_right=float(torch.cat(found.hits).double().mean()),
        tokens_change=tokens.value,
        tokens_interval=(tokens.value,) * 2 if over is None else (over.low, over.high),
        right=sum(found.right),
        lost=texts.mcnemar.b,
        gained=texts.mcnemar.c,
        right_interval=(texts.interval.low, texts.interval.high),
    )
