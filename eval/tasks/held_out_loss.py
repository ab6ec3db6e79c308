"""Loss of a model and its exits on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from deliberate.api.model import AdaptiveModel
from deliberate.eval.statistics import Estimate, ratio_of_sums
from deliberate.modeling.deliberation_gate import refined_states
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy in nats per token.

    Attributes:
        exits: of each exit.
        top: of the model itself.
        sums: nats of each document at full depth.
        counts: predicted tokens of each document.
    """

    exits: tuple[Estimate, ...]
    top: Estimate
    sums: tuple[float, ...]
    counts: tuple[int, ...]


@torch.no_grad()
def text_losses(
    model: AdaptiveModel,
    documents: Sequence[Sequence[int]],
    *,
    given: Sequence[int] | None = None,
    batch: int = 16,
    seed: int = 0,
) -> TextLoss:
    """Teacher-forced loss of every exit and of full depth, with intervals over documents.

    Args:
        model: in eval mode.
        documents: token ids.
        given: how many tokens of each are given, at least 1, at most all but one; the others are
            predicted. By default the first.
        batch: documents in one pass.

    Raises:
        DeliberateError: nothing to predict.
    """
    known = [1] * len(documents) if given is None else list(given)
    sizes = [len(ids) - start for ids, start in zip(documents, known, strict=True)]
    if not sizes or min(sizes) < 1 or min(known) < 1:
        raise DeliberateError("the loss needs documents with a token given and one to predict")
    places = len(model.exit_config.layers) + 1
    sums = np.zeros((len(documents), places))
    counts = np.asarray(sizes)
    order = sorted(range(len(documents)), key=lambda row: len(documents[row]))
    reader, backbone = model.reader(), model.backbone
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids = torch.zeros((len(rows), max(len(documents[r]) for r in rows)), dtype=torch.int64)
        predicts = torch.zeros((len(rows), ids.shape[1] - 1), dtype=torch.bool)
        for line, row in enumerate(rows):
            ids[line, : len(documents[row])] = torch.as_tensor(documents[row])
            predicts[line, known[row] - 1 : len(documents[row]) - 1] = True
        ids, predicts = ids.to(model.device), predicts.to(model.device)
        # Padding is on the right, where causality hides it.
        states = model(ids, output_exit_states=True)
        targets = ids[:, 1:][predicts]
        line_of = predicts.nonzero()[:, 0].cpu().numpy()
        last = refined_states(model.gate, states.last[:, :-1], predicts, backbone.logits)
        for k in range(places):
            if k < places - 1:
                normed = backbone.norm(states.exits[k][:, :-1][predicts])
                # Of a draft vocabulary too the loss is of the translator under the whole head.
                whole = reader.ids is None
                logits = (
                    reader.logits(k, normed)
                    if whole
                    else backbone.head_logits(model.exits.translate(k, normed))
                )
            else:
                logits = backbone.logits(last)
            nats = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            found = np.bincount(line_of, weights=nats.double().cpu().numpy(), minlength=len(rows))
            sums[rows, k] = found
    losses = [ratio_of_sums(sums[:, k], counts, seed=seed) for k in range(places)]
    return TextLoss(
        exits=tuple(losses[:-1]),
        top=losses[-1],
        sums=tuple(float(value) for value in sums[:, -1]),
        counts=tuple(int(count) for count in counts),
    )


def compare_losses(model: TextLoss, baseline: TextLoss, *, seed: int = 0) -> Estimate:
    """Nats per token that the model's last layer loses over a baseline's on the same documents.

    The interval resamples documents, both models' losses of a document together.

    Raises:
        DeliberateError: other documents.
    """
    if model.counts != baseline.counts:
        raise DeliberateError("the two losses are of other documents, or of other tokens")
    return ratio_of_sums(np.subtract(model.sums, baseline.sums), model.counts, seed=seed)
