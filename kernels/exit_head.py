"""Scores of an exit: from logits to the chosen token and how sure of it the exit is.

The torch reference of the op. One log-sum-exp serves every score, so asking for the confidence
costs one pass over the logits and no softmax is written out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_probability(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely token and its softmax probability.

    Args:
        logits: ``[..., V]``, any floating dtype.

    Returns:
        ``(token [...], int64; probability [...], the dtype of logits)``.
    """
    best, token = logits.max(dim=-1)
    return token, torch.exp(best - torch.logsumexp(logits, dim=-1))


def top_margin(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely token and the probability by which it leads the second.

    Shapes as in `top_probability`; V must be at least 2.
    """
    values, indices = logits.topk(2, dim=-1)
    probabilities = torch.exp(values - torch.logsumexp(logits, dim=-1, keepdim=True))
    return indices[..., 0], probabilities[..., 0] - probabilities[..., 1]


def normalised_certainty(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely token and 1 - H / log V, where H is the entropy of the softmax in nats.

    0 for the uniform distribution, 1 for a certain one. Shapes as in `top_probability`.
    """
    log_probabilities = torch.log_softmax(logits, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return logits.argmax(dim=-1), 1.0 - entropy / math.log(logits.shape[-1])
