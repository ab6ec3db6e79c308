"""A draft layer: one small transformer layer over the full-depth state that drafts the next tokens.

EAGLE's form (Li et al., arXiv:2401.15077, arXiv:2406.16858): entry t reads the state after the last
layer at position t and the embedding of token t + 1, and predicts the state at position t + 1, from
which the model's own norm and head choose token t + 2. For the drafts after the first one its own
output takes the place of the state, and it is trained on its own outputs several steps deep
(training-time test of EAGLE-3, arXiv:2503.01840). The head is read over a draft vocabulary
(FR-Spec, arXiv:2502.14856): rows of the model's own head, so nothing of it is stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import build_from


@dataclass(frozen=True)
class DraftLayerConfig:
    """Sizes of a draft layer.

    Attributes:
        hidden_size: width d of the model's states.
        heads, kv_heads, head_dim: of its attention.
        intermediate_size: of its MLP.
        vocabulary: tokens that it can draft.
        rope_theta: base of its rotary frequencies.
        eps: of its norms.

    Raises:
        DeliberateError: a size that is not positive, or heads that do not divide.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for one in ("hidden_size", "heads", "kv_heads", "head_dim", "intermediate_size",
                    "vocabulary"):  # fmt: skip
            if getattr(self, one) < 1:
                raise DeliberateError(f"draft layer: {one} {getattr(self, one)} must be at least 1")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise DeliberateError(
                f"draft layer: {self.heads} heads, {self.kv_heads} kv_heads, head_dim "
                f"{self.head_dim}: kv_heads must divide heads, and head_dim be even"
            )
        if not (self.rope_theta > 0 and self.eps > 0):
            raise DeliberateError(
                f"draft layer: rope_theta {self.rope_theta} and eps {self.eps} must be positive"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DraftLayerConfig:
        """Reads what `dataclasses.asdict` gives.

        Raises:
            DeliberateError: an unknown or missing key, or a value of another type or out of range.
        """
        return build_from(cls, dict(raw), "draft layer settings")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)


class DraftLayer(nn.Module):
    """The trained parts: norm of embeddings, joining matrix, one Llama layer, the vocabulary.

    The model's embedding, final norm and head are used with it and are not part of it.

    Attributes:
        config: sizes.
        vocabulary: int64 ``[vocabulary]``, ids that can be drafted, rising.
        embedding_norm: gain ``[d]`` of the RMS norm of embeddings.
        joining: ``[d, 2 d]``: joined [normed embedding; normed state] -> input of the layer.
    """

    vocabulary: Tensor

    def __init__(self, config: DraftLayerConfig) -> None:
        super().__init__()
        self.config = config
        d, inner = config.hidden_size, config.heads * config.head_dim
        kv = config.kv_heads * config.head_dim
        self.register_buffer("vocabulary", torch.arange(config.vocabulary))
        self.embedding_norm = nn.Parameter(torch.ones(d))
        self.attention_norm = nn.Parameter(torch.ones(d))
        self.mlp_norm = nn.Parameter(torch.ones(d))

        def drawn(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))

        self.joining = drawn(d, 2 * d)
        self.qkv = drawn(inner + 2 * kv, d)
        self.out = drawn(d, inner)
        self.gate_up = drawn(2 * config.intermediate_size, d)
        self.down = drawn(d, config.intermediate_size)

    def join(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """Input of the layer ``[..., d]`` from embeddings and normed states ``[..., d]``."""
        embedded = rms_norm(embedded, self.embedding_norm, self.config.eps)
        return F.linear(torch.cat([embedded, normed], dim=-1), self.joining)

    def keys_values(self, joined: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, ``[B, kv_heads, T, head_dim]``, of inputs ``[B, T, d]``.

        Args:
            positions: int64 ``[T]``, or ``[B, T]``.
        """
        config = self.config
        inner = config.heads * config.head_dim
        both = F.linear(rms_norm(joined, self.attention_norm, config.eps), self.qkv[inner:])
        keys, values = (self._split(part, config.kv_heads) for part in both.chunk(2, dim=-1))
        return rotate(keys, *self.rotary(positions)), values

    def queries(self, joined: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries ``[B, heads, T, head_dim]`` of inputs ``[B, T, d]``."""
        config = self.config
        inner = config.heads * config.head_dim
        flat = F.linear(rms_norm(joined, self.attention_norm, config.eps), self.qkv[:inner])
        return rotate(self._split(flat, config.heads), *self.rotary(positions))

    def after_attention(self, joined: Tensor, attended: Tensor) -> Tensor:
        """Output ``[B, T, d]`` from inputs and what their heads attended to ``[B, T, inner]``."""
        hidden = joined + F.linear(attended, self.out)
        gate, up = F.linear(rms_norm(hidden, self.mlp_norm, self.config.eps), self.gate_up).chunk(
            2, dim=-1
        )
        return hidden + F.linear(F.silu(gate) * up, self.down)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, head_dim]`` of int64 positions ``[T]``, float32.

        Of positions ``[B, T]``, of their own for every sequence, ``[B, 1, T, head_dim]``.
        """
        half = torch.arange(0, self.config.head_dim, 2, device=positions.device).float()
        angles = positions.float()[..., None] / self.config.rope_theta ** (
            half / self.config.head_dim
        )
        angles = torch.cat([angles, angles], dim=-1)
        if positions.dim() == 2:
            angles = angles[:, None]
        return angles.cos(), angles.sin()

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, hidden_keys: Tensor | None
    ) -> Tensor:
        """What queries ``[B, heads, T, head_dim]`` attend to, ``[B, T, heads * head_dim]``.

        Args:
            keys, values: ``[B, kv_heads, S, head_dim]``.
            hidden_keys: bool ``[T, S]`` or ``[B, 1, T, S]``, True where a query must not look; None
                for nowhere.
        """
        group = self.config.heads // self.config.kv_heads
        mask = None if hidden_keys is None else ~hidden_keys
        attended = F.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(group, dim=1),
            values.repeat_interleave(group, dim=1),
            attn_mask=mask,
        )
        return attended.transpose(1, 2).flatten(2)

    def _split(self, flat: Tensor, heads: int) -> Tensor:
        return flat.unflatten(-1, (heads, self.config.head_dim)).transpose(1, 2)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm of ``[..., d]``."""
    return F.rms_norm(x, (x.shape[-1],), gain, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``[B, heads, T, head_dim]`` (Su et al., arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
