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

from omegaconf import DictConfig
from torch import nn

from deliberate.api.model import AdaptiveModel
from deliberate.executors.quantization import Storage
from deliberate.executors.rounded_layers import ROUNDINGS, round_layers, rounding_named
from deliberate.train.losses import ExitScale
from deliberate.train.objectives.base import Recipe
from deliberate.train.objectives.distill import DistillObjective
from deliberate.train.setting_checks import check_choice


class QatObjective(DistillObjective):
    """Joint training of the model and its exits while the layers' weights are rounded.

    Args:
        weights: storage that it is trained for: ``int4``, ``q8_0`` (8 bits, activations too) or
            ``int8`` (weights alone); or 4 or 3 bits with one scale a row, ``int4_rows`` and
            ``int3_rows``, which no executor keeps.
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
        round_layers(model.backbone, rounding_named(str(weights)))
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
    check_choice(cfg, "recipe.weights", ROUNDINGS)


RECIPE = Recipe(QatObjective, check=check_storage)
