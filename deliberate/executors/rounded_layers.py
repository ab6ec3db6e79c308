"""Linear modules that multiply with their weight as it will be stored: for training and measuring.

Weights are rounded by the executor's own code (`store`, `widened`), so what is trained or measured
is what is run; activations as the kernels of blocks round them. Gradients pass the rounding
unchanged (straight-through, arXiv:1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.executors.quantization import Storage, as_storage, store, widened
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

STORAGES = (Storage.INT8, Storage.Q8_0, Storage.INT4)
# Bits of grids with one scale a row, which no executor keeps: what other engines' 4 bits without
# groups lose, and a case where rounding hurts.
ROW_GRIDS = {"int4_rows": 4, "int3_rows": 3}
# Values of an activation that the kernels of blocks round together.
_BLOCK = 32


class RoundedLinear(nn.Linear):
    """``nn.Linear`` that multiplies with its weight as it will be stored.

    Args:
        linear: whose parameters it takes over.
        storage: of the weight, or one of `ROW_GRIDS`; in blocks, activations are rounded to 8 bits
            too.
    """

    def __init__(self, linear: nn.Linear, storage: Storage | str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.storage = storage
        self.train(linear.training)
        self._change: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if isinstance(self.storage, Storage) and self.storage.in_blocks:
            x = round_activations(x)
        return F.linear(x, self.weight + self._rounding(), self.bias)

    def _rounding(self) -> Tensor:
        """What rounding adds to the weight; the same until the weight is changed."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        now = (version, weight.data_ptr(), weight.dtype)
        if self._change is None or self._change[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                rounded = as_rounded(weight.detach(), self.storage)
                self._change = now, (rounded.to(weight.device) - weight).to(weight.dtype)
        return self._change[1]


def as_rounded(weight: Tensor, storage: Storage | str) -> Tensor:
    """A weight ``[N, K]`` as it is multiplied with when it is stored so, float32."""
    if isinstance(storage, Storage):
        return widened(store(weight, storage), torch.float32)
    most = 2 ** (ROW_GRIDS[storage] - 1) - 1
    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True) / most
    return (wide / torch.where(scale > 0, scale, 1.0)).round() * scale


def rounding_named(name: str) -> Storage | str:
    """The storage of this name, or the name of a grid with one scale a row.

    Raises:
        DeliberateError: there is none that rounds.
    """
    found = name if name in ROW_GRIDS else as_storage(name)
    if found not in STORAGES and found not in ROW_GRIDS:
        raise DeliberateError(f"weights {name!r} round nothing: use {', '.join(ROUNDINGS)}")
    return found


ROUNDINGS = (*map(str, STORAGES), *ROW_GRIDS)


def round_activations(x: Tensor) -> Tensor:
    """Each 32 values of the last dimension at 8 bits with a scale of their own; straight-through.

    ``[..., K]``; a rest that fills no block is rounded by itself.
    """
    width = x.shape[-1]
    wide = F.pad(x.detach(), (0, -width % _BLOCK)).float().unflatten(-1, (-1, _BLOCK))
    scale = wide.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale > 0, scale, 1.0)
    rounded = ((wide / scale).round() * scale).flatten(-2)[..., :width].to(x.dtype)
    return x + (rounded - x).detach()


def round_layers(backbone: Backbone, storage: Storage | str) -> int:
    """Replaces every linear module of the layers; returns how many there are.

    Raises:
        DeliberateError: the layers have none, as where they are of another class.
    """
    count = 0
    for layer in backbone.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, RoundedLinear(child, storage))
                    count += 1
    if not count:
        raise DeliberateError(
            f"the layers of {type(backbone.model).__name__} have no linear modules to round"
        )
    return count
