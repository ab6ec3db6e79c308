"""Turns the residual stream of a model of the Llama family, which changes no output.

Between layers a hidden state ``h [d]`` may be kept as ``h Q`` for any orthogonal ``Q [d, d]``: an
RMS norm without a gain has the same value in every basis, so gains go into the matrices that read
the normed state, what reads it is multiplied by Q and what writes it by Q's transpose (QuaRot,
arXiv:2404.00456). The weights are other numbers then. So the loss by rounding can be measured of a
model whose weights came from a file that was rounded already, as GGUF's are: those lie on the grid
of that file, and rounding to it again would find them unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deliberate.executors.fused.weights import unsupported
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError


def orthogonal(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix ``[width, width]``, float64."""
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, width, generator=source, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()  # uniform, where plain QR is not


@torch.no_grad()
def rotate_residual(model: Any, *, seed: int = 0) -> None:
    """Rotates a transformers model in place; head and embedding are matrices of their own then.

    Args:
        model: one that the fused executor runs, in any floating dtype.
        seed: of the rotation.

    Raises:
        DeliberateError: a model of another kind.
    """
    backbone = Backbone(model)
    reason = unsupported(backbone)
    if reason is not None:
        raise DeliberateError(f"the residual stream cannot be rotated: {reason}")
    head: Any = backbone.lm_head
    embedding: Any = model.get_input_embeddings()
    turn = orthogonal(embedding.weight.shape[1], seed).to(embedding.weight.device)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    _reads((head,), backbone.norm, turn)
    _set(embedding.weight, embedding.weight.double() @ turn)
    layers: Any = backbone.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        _reads((attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm, turn)
        _reads((mlp.gate_proj, mlp.up_proj), layer.post_attention_layernorm, turn)
        for writes in (attention.o_proj, mlp.down_proj):
            _set(writes.weight, turn.T @ writes.weight.double())
            if writes.bias is not None:
                _set(writes.bias, writes.bias.double() @ turn)


def _reads(linears: tuple[Any, ...], norm: Any, turn: Tensor) -> None:
    """Matrices over a normed state take over the norm's gain, and read the rotated state."""
    for linear in linears:
        _set(linear.weight, (linear.weight.double() * norm.weight.double()) @ turn)
    norm.weight.fill_(1.0)


def _set(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value.to(weight.dtype))
