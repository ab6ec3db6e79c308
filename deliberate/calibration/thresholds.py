"""Plain thresholds for the exits of a trained model, from teacher-forced agreement.

For each exit, the least confidence above which tokens agree with the top at a wanted rate on
problems of the training side. This is a setting, not a certificate: it is chosen on the sample it
is measured on, and says nothing of the errors that a wrong token causes later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from deliberate.calibration.cuts import cuts
from deliberate.config import IGNORE_INDEX
from deliberate.modeling.deliberation_gate import refined_states
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError

# No token exits here. 1.0 would not say that: a float32 softmax can round to it.
NEVER = math.inf


def least_threshold(confidence: Tensor, agrees: Tensor, target: float) -> float:
    """Least t such that tokens with ``confidence >= t`` agree at rate `target` or more.

    Args:
        confidence: ``[N]`` in [0, 1].
        agrees: ``[N]`` bool.
        target: in (0, 1].

    Returns:
        A value of `confidence`, or `NEVER` where even the most confident tokens agree less often.
    """
    if not 0.0 < target <= 1.0:
        raise DeliberateError(f"target agreement {target} is outside (0, 1]")
    possible = cuts(confidence.double().cpu().numpy(), agrees.double().cpu().numpy())
    # Counts are exact and divided once: sums of ``agrees - target`` would round.
    good = np.flatnonzero(possible.totals / possible.counts >= target)
    if len(good) == 0:
        return NEVER
    return min(1.0, max(float(possible.scores[good[-1]]), torch.finfo(torch.float32).tiny))


def choose_thresholds(
    model: ModelView, batches: Iterable[dict[str, Tensor]], target: float
) -> tuple[float, ...]:
    """One threshold per exit for agreement `target` among the tokens that exit there.

    Tokens that would have exited earlier do not count for a later exit, as in decoding.

    Args:
        model, batches: as for `read_exits`.
        target: in (0, 1].
    """
    return thresholds_in_turn(*read_exits(model, batches), target)


@torch.no_grad()
def read_exits(
    model: ModelView, batches: Iterable[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Confidence and agreement with the top of every exit, ``[N]`` each, float32 and bool.

    Args:
        model: in eval mode.
        batches: right-padded ``input_ids`` and ``labels`` ``[B, T]``; targets are what counts.
    """
    confidences: list[list[Tensor]] = [[] for _ in model.exit_config.layers]
    agreements: list[list[Tensor]] = [[] for _ in model.exit_config.layers]
    reader, backbone = model.reader(), model.backbone
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        predicts = batch["labels"][:, 1:] != IGNORE_INDEX
        packed = {name: batch[name].to(model.device) for name in ("position_ids",) if name in batch}
        states = model(ids, output_exit_states=True, **packed)
        places = packed.get("position_ids")
        places = None if places is None else places[:, :-1]
        last = refined_states(
            model.gate,
            states.last[:, :-1],
            predicts.to(model.device),
            backbone.logits,
            position_ids=places,
        )
        top = backbone.logits(last).argmax(dim=-1)
        for index, state in enumerate(states.exits):
            token, confidence = reader.score(index, backbone.norm(state[:, :-1][predicts]))
            confidences[index].append(confidence.float())
            agreements[index].append(token == top)
    return [torch.cat(parts) for parts in confidences], [torch.cat(parts) for parts in agreements]


def exit_shares(confidences: Sequence[Tensor], thresholds: Sequence[float]) -> tuple[float, ...]:
    """The share of the tokens that exits at each exit under these thresholds.

    Args:
        confidences: ``[N]`` for each exit, shallow to deep.
    """
    remaining = torch.ones_like(confidences[0], dtype=torch.bool)
    shares = []
    for confidence, threshold in zip(confidences, thresholds, strict=True):
        exits = remaining & (confidence >= threshold)
        shares.append(float(exits.double().mean()))
        remaining &= ~exits
    return tuple(shares)


def describe_thresholds(
    layers: Sequence[int], thresholds: Sequence[float], shares: Sequence[float], target: float
) -> str:
    """What the thresholds do, with what to do where they let no token exit."""
    each = ", ".join(
        f"exit{layer} {threshold:.4g} ({share:.1%} of the tokens exit)" if share else
        f"exit{layer} none"
        for layer, threshold, share in zip(layers, thresholds, shares, strict=True)
    )  # fmt: skip
    text = f"thresholds for {target:.1%} agreement with the last layer: {each}"
    if not any(shares):
        text += (
            "\nno token exits early at these thresholds, and threshold mode will not be faster than"
            " dense: train longer, or lower trainer.target_agreement"
        )
    return text


def thresholds_in_turn(
    confidences: Sequence[Tensor], agreements: Sequence[Tensor], target: float
) -> tuple[float, ...]:
    """`least_threshold` exit by exit, each on the tokens that did not exit before.

    Args:
        confidences, agreements: ``[N]`` for each exit, shallow to deep.
        target: agreement among the tokens that exit, in (0, 1].

    Returns:
        One per exit; `NEVER` where even the tokens of highest confidence agree less often.
    """
    remaining = torch.ones_like(agreements[0])
    chosen = []
    for confidence, agrees in zip(confidences, agreements, strict=True):
        threshold = NEVER
        if bool(remaining.any()):
            threshold = least_threshold(confidence[remaining], agrees[remaining], target)
        chosen.append(threshold)
        remaining = remaining & (confidence < threshold)
    return tuple(chosen)
