"""Cross-entropy to a distribution, in one pass over the logits each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SoftCrossEntropy(torch.autograd.Function):
    """Its gradient is softmax - teacher: nothing of the log-probabilities has to be kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward(logits, normaliser, teacher)
        return normaliser.mean() - (teacher * logits).sum(dim=-1).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, normaliser, teacher = ctx.saved_tensors
        made = (logits - normaliser).exp_().sub_(teacher)
        return made.mul_(gradients[0] / len(logits)), None


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of ``[n, V]`` logits to the probabilities ``[n, V]`` of a teacher.

    The teacher's rows sum to 1 and have no gradient.
    """
    found: Tensor = _SoftCrossEntropy.apply(logits, teacher)  # type: ignore[no-untyped-call]
    return found
