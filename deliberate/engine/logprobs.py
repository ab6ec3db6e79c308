"""Log-probabilities of tokens and of their alternatives.

They are of the model's own distribution where the token was chosen: ``log_softmax`` of the logits
before temperature, truncation, penalties and constraints, as in vLLM (``raw_logprobs``). Of a token
that exited early and was accepted unverified that is the exit head's distribution; in dense and
exact mode it is always full depth's.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one place of an output.

    Attributes:
        logprob: natural logarithm of the probability of the token that was chosen.
        top: the most likely tokens with theirs, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of a token and the `count` most likely ones, from logits ``[V]`` of any floating dtype."""
    values = logits.float().log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        best = values.topk(min(count, values.shape[-1]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(float(values[token]), top)
