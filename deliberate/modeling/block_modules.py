"""Linear layers and embeddings whose weights stay in quantised blocks.

They stand in a model in the place of ``nn.Linear`` and ``nn.Embedding``. Their blocks may be memory
that a file is mapped to, so they are neither parameters nor trained; states are float32 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight
from deliberate.utils.errors import DeliberateError


class _Blocks(nn.Module):
    """A matrix of one part; its bytes are a buffer, so that they are hashed with the weights."""

    data: Tensor

    def __init__(self, part: BlockPart, columns: int) -> None:
        super().__init__()
        self.register_buffer("data", part.data)
        self._format: BlockFormat = part.format
        self._rotary = part.rotary
        self._columns = columns
        self._made: BlockWeight | None = None

    @property
    def blocks(self) -> BlockWeight:
        """The matrix without a bias.

        Raises:
            BorderError: it was moved from the CPU.
        """
        made = self._made
        if made is None or made.parts[0].data is not self.data:
            made = BlockWeight((BlockPart(self.data, self._format, self._rotary),), self._columns)
            self._made = made
        return made

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_made": None}  # an address belongs to its process


class BlockLinear(_Blocks):
    """``nn.Linear`` with weights in blocks.

    Without gradients a product is that of the C++ kernels, activations rounded to 8 bits; where a
    gradient with respect to its input is wanted, that of the widened weights.

    Args:
        part: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
    """

    bias: nn.Parameter | None

    def __init__(self, part: BlockPart, columns: int, bias: Tensor | None = None) -> None:
        super().__init__(part, columns)
        self.in_features, self.out_features = columns, part.data.shape[0]
        kept = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", kept)

    @property
    def weight(self) -> Tensor:
        """All of it as float32 ``[N, K]``, widened at every call: read `blocks` where possible."""
        return self.blocks.widen()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, dtype of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        flat = x.reshape(-1, x.shape[-1]).float().contiguous()
        made = self.blocks.multiply(flat)
        if self.bias is not None:
            made = made + self.bias
        return made.to(x.dtype).view(*x.shape[:-1], -1)


class BlockEmbedding(_Blocks):
    """``nn.Embedding`` with weights in blocks; rows are widened to float32 when they are read."""

    def __init__(self, part: BlockPart, columns: int) -> None:
        super().__init__(part, columns)
        self.num_embeddings, self.embedding_dim = part.data.shape[0], columns
        self.states_dtype = torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[...]`` -> ``[..., d]``.

        Raises:
            IndexError: an id without a row, as of ``nn.Embedding``.
        """
        flat = ids.reshape(-1).tolist()
        if flat and not 0 <= min(flat) <= max(flat) < self.num_embeddings:
            raise IndexError("index out of range")
        return self.blocks.widen(flat).view(*ids.shape, -1)


def weight_count(model: nn.Module) -> int:
    """Weights of a model, those in blocks included; what two modules share counts once."""
    held = {
        one.data.data_ptr(): one.data.shape[0] * one._columns
        for one in model.modules()
        if isinstance(one, _Blocks)
    }
    return sum(held.values()) + sum(parameter.numel() for parameter in model.parameters())


def has_blocks(model: nn.Module) -> bool:
    """Whether weights of a model are kept in blocks."""
    return any(isinstance(module, _Blocks) for module in model.modules())


def refuse_saving(model: nn.Module) -> None:
    """Raises DeliberateError where a model's weights are in blocks: checkpoints hold none."""
    if has_blocks(model):
        raise DeliberateError(
            "the weights are those of a GGUF file, in blocks: save without merge=True, or load the "
            "file without weights='file'"
        )
