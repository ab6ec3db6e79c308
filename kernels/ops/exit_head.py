"""Exit head: from a hidden state to the token an exit would choose and how sure of it it is.

`read_head` is final norm -> translator -> rows of the LM head -> the two best tokens, log-sum-exp
and entropy, in one pass over the weights: the logits are never written. The translator is meant to
be folded into the head; a low-rank one may also be given apart. With a list of token ids only those
rows of the head are read (a trimmed vocabulary).

The older functions take logits that exist already: `top_probability`, `top_margin`,
`normalised_certainty`. One log-sum-exp serves every score (online softmax: Milakov and
Gimelshein, 2018).

Floor: the bytes of the head, V * d * itemsize, over the bandwidth of the memory.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from deliberate.kernels.ops import exit_head_triton
from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.rows import active_rows, check_rows
from deliberate.kernels.triton_support import Tile, prefers_triton
from deliberate.utils.errors import DeliberateError


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


class HeadReading(NamedTuple):
    """What an exit head says of R hidden states.

    ``tokens`` int64 ``[R, 2]``: the best and the second (of equals the one listed first).
    ``values`` float32 ``[R, 2]``: their logits. ``normaliser`` float32 ``[R]``: log-sum-exp of all
    logits. ``entropy`` float32 ``[R]``: of the softmax, in nats.

    A row with a NaN or +inf logit has tokens 0 and everything else NaN, so that it exits at
    no threshold. With a list of active rows, entry i belongs to ``rows[i]`` and entries past the
    count are as a NaN row.
    """

    tokens: Tensor
    values: Tensor
    normaliser: Tensor
    entropy: Tensor

    def probability(self) -> Tensor:
        """Softmax probability of the best token, float32 ``[R]``."""
        return torch.exp(self.values[:, 0] - self.normaliser)

    def margin(self) -> Tensor:
        """How far the best token's probability leads the second's, float32 ``[R]``."""
        best, second = torch.exp(self.values - self.normaliser[:, None]).unbind(dim=1)
        return best - second

    def certainty(self, vocab_size: int) -> Tensor:
        """1 - entropy / log(vocab_size), float32 ``[R]``."""
        return 1.0 - self.entropy / math.log(vocab_size)


def read_head(
    hidden: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    down: Tensor | None = None,
    up: Tensor | None = None,
    vocabulary: Tensor | None = None,
    softcap: float = 0.0,
    rows: Tensor | None = None,
    count: Tensor | None = None,
) -> HeadReading:
    """The two best tokens of R hidden states and the scores that every measure needs.

    Args:
        hidden: ``[R, d]``.
        weight: head, or head with the translator folded in, ``[V, d]``.
        gain: RMS norm gain ``[d]``, or None where hidden is normed already.
        eps: of the norm.
        down, up: low-rank translator x + up(down(x)), ``[rank, d]`` and ``[d, rank]``.
        vocabulary: int64 ``[V']``, the rows of ``weight`` to read; tokens are these ids.
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        rows, count: active rows, int32 ``[<= R]`` and ``[1]``, on the device.

    Raises DeliberateError for shapes that do not fit and fewer than two tokens to choose from.
    """
    return HeadReading(
        *exit_head(hidden, weight, gain, eps, down, up, vocabulary, softcap, rows, count)
    )


def _outputs(hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = hidden.shape[0] if rows is None else rows.shape[0]
    scores = hidden.new_empty((2, total), dtype=torch.float32)
    return (
        hidden.new_empty((total, 2), dtype=torch.int64),
        hidden.new_empty((total, 2), dtype=torch.float32),
        scores.new_empty(total),
        scores.new_empty(total),
    )


@KERNELS.define(outputs=_outputs)
def exit_head(
    hidden: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    eps: float,
    down: Tensor | None,
    up: Tensor | None,
    vocabulary: Tensor | None,
    softcap: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> KernelRequest:
    """The operator behind `read_head`; the fields of a `HeadReading`."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise DeliberateError(
            f"exit_head: hidden [R, d] and weight [V, d] are needed, got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    choices = weight.shape[0] if vocabulary is None else vocabulary.numel()
    if choices < 2:
        raise DeliberateError(
            f"exit_head: {choices} token(s) to choose from; at least 2 are needed"
        )
    if (down is None) != (up is None):
        raise DeliberateError("exit_head: give both factors of the translator, or neither")
    check_rows("exit_head", rows, count, hidden.shape[0])
    return KernelRequest.of(hidden, rows=hidden.shape[0], width=hidden.shape[1], vocab=choices)


@KERNELS.register("exit_head", "torch")
def exit_head_torch(
    hidden: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    eps: float,
    down: Tensor | None,
    up: Tensor | None,
    vocabulary: Tensor | None,
    softcap: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference: in the dtype of ``weight``, softmax in float32 (float64 for float64)."""
    tokens, values, normaliser, entropy = _outputs(hidden, rows)
    active = active_rows(rows, count, hidden.shape[0], hidden.device)
    normed = _translated(hidden[active], gain, eps, down, up)
    head = weight if vocabulary is None else weight[vocabulary]
    logits = linear(normed, head.to(normed.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    sound = (logits < math.inf).all(dim=1)
    logits = torch.where(sound[:, None], logits, 0.0)
    # argmax twice, not topk: of equals the first listed.
    best = logits.argmax(dim=1, keepdim=True)
    second = logits.scatter(1, best, -math.inf).argmax(dim=1, keepdim=True)
    # All others at -inf: the second is then the first listed that is not the best.
    second = torch.where(second == best, (best == 0).long(), second)
    places = torch.cat((best, second), dim=1)
    log_sum = torch.logsumexp(logits, dim=1)
    logs = logits - log_sum[:, None]
    mass = torch.where(logs > -math.inf, logs.exp() * logs, 0.0)
    n = active.numel()
    bad = ~sound
    ids = places if vocabulary is None else vocabulary[places]
    tokens[:n] = ids.masked_fill(bad[:, None], 0)
    values[:n] = logits.gather(1, places).masked_fill(bad[:, None], math.nan).float()
    normaliser[:n] = log_sum.masked_fill(bad, math.nan).float()
    entropy[:n] = (-mass.sum(dim=1)).masked_fill(bad, math.nan).float()
    tokens[n:], values[n:], normaliser[n:], entropy[n:] = 0, math.nan, math.nan, math.nan
    return tokens, values, normaliser, entropy


def _translated(
    hidden: Tensor, gain: Tensor | None, eps: float, down: Tensor | None, up: Tensor | None
) -> Tensor:
    if gain is not None:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        hidden = (wide * scale).to(hidden.dtype) * gain.to(hidden.dtype)
    if down is not None and up is not None:
        hidden = hidden + linear(linear(hidden, down), up)
    return hidden


@KERNELS.register("exit_head", "triton", prefers_triton)
def exit_head_fused(
    hidden: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    eps: float,
    down: Tensor | None,
    up: Tensor | None,
    vocabulary: Tensor | None,
    softcap: float,
    rows: Tensor | None,
    count: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches: partial results of every block of tokens, then one program per row."""
    # Two small products of cuBLAS: folding the translator into the head avoids them. And float16
    # needs its norm first: the matrix unit's operand, a state times a gain, could overflow.
    half = weight.dtype == torch.float16 and hidden.shape[0] > 1 and gain is not None
    if down is not None or half:
        hidden, gain = _translated(hidden, gain, eps, down, up), None
    outputs = _outputs(hidden, rows)
    exit_head_triton.launch(
        hidden, weight, gain, eps, vocabulary, softcap, rows, count, outputs, tile
    )
    return outputs
