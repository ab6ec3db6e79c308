"""The layers up to an exit, with its head, as a model of its own: a draft for other engines.

The exit's translator is linear, so ``head (translator x) = (head translator) x``: the new model has
the architecture of the old one, fewer layers, and a head of its own. It answers as the exit does,
and whoever runs speculative decoding with a small model (Leviathan et al., arXiv:2211.17192) can
use it: transformers' ``assistant_model``, llama.cpp's draft model. Those verify every draft, so it
changes no answer there, only the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import Translator
from deliberate.modeling.pruning import keep_layers
from deliberate.utils.errors import DeliberateError

# Tokens of the comparison that `exit_model` ends with, and how far logits may lie apart in float32,
# in units of their spread.
_TRIED, _TOLERANCE = 24, 1e-3


def chosen_exit(model: AdaptiveModel, layer: int | None) -> int:
    """Number of the exit after `layer`; of the shallowest one without a layer.

    Raises:
        DeliberateError: no such exit, or exits that were never trained.
    """
    layers = list(model.exit_config.layers)
    if layer is not None and layer not in layers:
        raise DeliberateError(
            f"layer {layer} has no exit: the model's are after layers "
            f"{', '.join(str(one) for one in layers)}"
        )
    if not model.exits.trained:
        raise DeliberateError(
            "the model's exits were never trained, so a draft of them would be wrong nearly "
            "always: fit them first with `deliberate fit MODEL out=DIR`"
        )
    return 0 if layer is None else layers.index(layer)


def exit_model(model: AdaptiveModel, exit_index: int) -> PreTrainedModel:
    """A model of its own that computes what the exit computes; weights are copied.

    Raises:
        DeliberateError: matrices that are in blocks or quantised, layers that cannot be cut off,
            or an architecture whose cut model does not give the exit's logits.
    """
    depth = model.exit_config.layers[exit_index]
    translator: Any = model.exits.translators[exit_index]
    head: Any = model.backbone.lm_head
    plain = isinstance(head, nn.Linear) and type(head.weight) is nn.Parameter
    if not plain:
        raise DeliberateError(
            f"the head is {type(head).__name__} with {type(head.weight).__name__}: load the model "
            "with weights in floating point"
        )
    shallow: Any = keep_layers(model.base, range(1, depth + 1))
    if model.exit_config.translator is not Translator.NONE:
        with torch.no_grad():
            folded = head.weight @ translator.matrix().to(head.weight.dtype)
        _own_head(shallow, folded, head.bias)
    shallow.eval()
    _compare(model, exit_index, shallow)
    return shallow  # type: ignore[no-any-return]


def _own_head(shallow: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Gives the model a head that is not its embedding any more."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    shallow.set_output_embeddings(made)
    shallow.config.tie_word_embeddings = False


@torch.no_grad()
def _compare(model: AdaptiveModel, exit_index: int, shallow: Any) -> None:
    """Raises unless the new model gives the exit's logits on some tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.backbone.vocab_size, (1, _TRIED), generator=generator)
    ids = ids.to(model.device)
    states = model(input_ids=ids, output_exit_states=True).exits[exit_index]
    reader, normed = model.reader(), model.backbone.norm(states)
    expected = reader.own_logits(exit_index, normed).float()
    found = shallow(input_ids=ids, use_cache=False).logits.float()
    if reader.ids is not None:  # exported with every row of the head, compared where both have them
        found = found[..., reader.ids]
    finer = model.base.dtype in (torch.float32, torch.float64)
    apart = float((found - expected).abs().max() / expected.std())
    if not apart <= (_TOLERANCE if finer else 0.1):
        raise DeliberateError(
            f"a {model.config.model_type!r} cut after layer {model.exit_config.layers[exit_index]} "
            f"gives other logits than the exit (by {apart:.2g} of their spread): it cannot be "
            "exported"
        )
