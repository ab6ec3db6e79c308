"""How many drafts of a draft layer the model accepts, on held-out text, without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.modeling.draft_layer import DraftLayer
from deliberate.train.draft.draft_trainer import TextReader
from deliberate.train.draft.hidden_cache import Text
from deliberate.train.draft.unrolled import unrolled


@dataclass(frozen=True)
class DraftAgreement:
    """Acceptance of greedy drafts, teacher-forced: the chain goes on with the model's own tokens.

    Attributes:
        survives: share of chains whose first 1, 2, ... drafts are all the model's choice.
        chains: how many chains.
        confidences: probability that the layer gave to each draft whose predecessors were accepted.
        accepted: whether the model chose the same.
    """

    survives: tuple[float, ...]
    chains: int
    confidences: Tensor
    accepted: Tensor

    def tokens_per_pass(self, drafts: int) -> float:
        """Expected tokens of a full-depth pass with so many drafts."""
        return 1.0 + sum(self.survives[:drafts])


@torch.inference_mode()
def measure_agreement(
    layer: DraftLayer,
    head: Tensor,
    full_head: Tensor,
    data: TextReader,
    texts: Sequence[Text],
    *,
    depth: int,
) -> DraftAgreement:
    """Compares a layer's greedy drafts with the tokens that the model prefers.

    Args:
        head: rows of the draft vocabulary, ``[vocabulary, d]``.
        full_head: the model's head ``[V, d]``.
        depth: drafts of a chain.
    """
    alive_total = torch.zeros(depth)
    chains = 0
    confidences: list[Tensor] = []
    accepted: list[Tensor] = []
    for text in texts:
        states = data.read(text)
        count = len(states.embedded) - states.first - depth + 1
        if count < 1:
            continue
        outputs = unrolled(
            layer, states.embedded, states.normed[:-1], data.norm,
            depth=depth, first=states.first,
        )  # fmt: skip
        wanted = F.linear(states.normed[states.first + 1 :], full_head).argmax(dim=-1)
        alive = torch.ones(count, dtype=torch.bool, device=wanted.device)
        for step, output in enumerate(outputs):
            top = F.linear(data.norm(output), head)[:count].softmax(dim=-1).max(dim=-1)
            hit = layer.vocabulary[top.indices] == wanted[step : step + count]
            confidences.append(top.values[alive].cpu())
            accepted.append(hit[alive].cpu())
            alive = alive & hit
            alive_total[step] += int(alive.sum())
        chains += count
    return DraftAgreement(
        tuple((alive_total / max(1, chains)).tolist()),
        chains,
        torch.cat(confidences) if confidences else torch.zeros(0),
        torch.cat(accepted) if accepted else torch.zeros(0, dtype=torch.bool),
    )
