"""Training under the rounding that the executor will apply (quantisation-aware training).

The forward pass multiplies with the weights as they will be stored (`store`, `widened`: the
executor's own code, so what is trained is what is run) and rounds activations as the kernels of
blocks do; gradients pass the rounding unchanged (straight-through, arXiv:1308.3432; QAT,
arXiv:1712.05877). Exits are trained over the same rounded layers, and their thresholds are set
there. What is saved are the float weights: load them with ``weights=`` the same storage.

torchao's fake quantisation rounds 4 bits to a grid with a whole zero point; blocks of Q4_1 have a
float minimum that is fitted, so a model trained on one grid is rounded anew by the other.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.api.model import AdaptiveModel
from deliberate.executors.quantization import Storage, as_storage, store, widened
from deliberate.train.losses import ExitScale
from deliberate.train.objectives.base import Recipe
from deliberate.train.objectives.distill import DistillObjective
from deliberate.train.setting_checks import check_choice
from deliberate.utils.errors import DeliberateError

STORAGES = (Storage.INT8, Storage.Q8_0, Storage.INT4)
# Values of an activation that the kernels of blocks round together.
_BLOCK = 32


class RoundedLinear(nn.Linear):
    """``nn.Linear`` that multiplies with its weight as it will be stored.

    Args:
        linear: whose parameters it takes over.
        storage: of the weight; in blocks, activations are rounded to 8 bits too.
    """

    def __init__(self, linear: nn.Linear, storage: Storage) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.storage = storage
        self.train(linear.training)
        self._change: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if self.storage.in_blocks:
            x = round_activations(x)
        return F.linear(x, self.weight + self._rounding(), self.bias)

    def _rounding(self) -> Tensor:
        """What rounding adds to the weight; the same until the weight is changed."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        now = (version, weight.data_ptr(), weight.dtype)
        if self._change is None or self._change[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                rounded = widened(store(weight.detach(), self.storage), torch.float32)
                self._change = now, (rounded.to(weight.device) - weight).to(weight.dtype)
        return self._change[1]


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


def round_layers(model: AdaptiveModel, storage: Storage) -> int:
    """Replaces every linear module of the layers; returns how many there are.

    Raises:
        DeliberateError: the layers have none, as where they are of another class.
    """
    count = 0
    for layer in model.backbone.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, RoundedLinear(child, storage))
                    count += 1
    if not count:
        raise DeliberateError(
            f"recipe=qat: the layers of {type(model.base).__name__} have no linear modules to round"
        )
    return count


class QatObjective(DistillObjective):
    """Joint training of the model and its exits while the layers' weights are rounded.

    Args:
        weights: storage that it is trained for: ``int4``, ``q8_0`` (8 bits, activations too) or
            ``int8`` (weights alone).
        scale, early_scale, layer_dropout, gate_weight, gradual_share, kl_weight, ce_weight,
            temperature, teacher: as in `DistillObjective`; the teacher is the float model at best.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        weights: str = Storage.INT4,
        scale: ExitScale | str = ExitScale.UNIFORM,
        early_scale: float = 0.4,
        layer_dropout: float = 0.0,
        gate_weight: float = 0.1,
        gradual_share: float = 0.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.5,
        temperature: float = 1.0,
        teacher: nn.Module | None = None,
    ) -> None:
        round_layers(model, as_storage(weights))
        super().__init__(
            model,
            scale=scale,
            early_scale=early_scale,
            layer_dropout=layer_dropout,
            gate_weight=gate_weight,
            gradual_share=gradual_share,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
            teacher=teacher,
        )


def check_storage(cfg: DictConfig) -> None:
    """The storage is one that rounds."""
    check_choice(cfg, "recipe.weights", [str(one) for one in STORAGES])


RECIPE = Recipe(QatObjective, check=check_storage)
