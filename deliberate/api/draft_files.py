"""The draft layer in a model's folder: `draft.safetensors`, and its settings and prior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deliberate.engine.draft_lengths import DraftPrior
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file
from deliberate.utils.hashing import tensors_sha256

DRAFT_NAME = "draft.safetensors"
# Embeddings that identify base weights.
_SAMPLED = 64


def draft_settings(layer: DraftLayer, prior: DraftPrior) -> dict[str, Any]:
    """What `adaptive_config.json` says of a draft layer."""
    return {"layer": layer.config.to_dict(), "prior": prior.to_dict()}


def base_sample(backbone: Backbone) -> str | None:
    """SHA-256 of a few embeddings and the final norm, which other base weights do not share.

    None where weights are not float32: the same ones are other numbers there.
    """
    if backbone.dtype is not torch.float32:
        return None
    rows = torch.linspace(0, backbone.vocab_size - 1, _SAMPLED).long().to(backbone.device)
    with torch.no_grad():
        taken = {"embeddings": backbone.embed_tokens(rows)}
        gain = getattr(backbone.norm, "weight", None)
        if gain is not None:
            taken["norm"] = gain.detach()
        return tensors_sha256({name: one.float().cpu() for name, one in taken.items()})


def save_draft(folder: Path, layer: DraftLayer | None) -> None:
    """Writes the layer in bfloat16, or removes one of a model that was saved here before."""
    path = folder / DRAFT_NAME
    if layer is None:
        path.unlink(missing_ok=True)
        return
    # Drafts are verified: rounding costs a little acceptance at most, and half the file.
    state: dict[str, Tensor] = {
        name: tensor.detach().to(torch.bfloat16).contiguous().cpu()
        for name, tensor in layer.named_parameters()
    }
    state["vocabulary"] = layer.vocabulary.to(torch.int32).cpu()
    with atomic_file(path) as partial:
        save_file(state, partial, metadata={"format": "pt"})


def load_draft(folder: Path, raw: Mapping[str, Any]) -> tuple[DraftLayer, DraftPrior]:
    """The layer and prior of a folder; the layer's weights, bfloat16, stay in the file, mapped.

    Args:
        raw: what `draft_settings` gave.

    Raises:
        DeliberateError: a file that is missing, truncated or of another layer.
    """
    if not isinstance(raw, Mapping) or set(raw) != {"layer", "prior"}:
        raise DeliberateError(f"draft settings need 'layer' and 'prior', found {raw!r:.60}")
    with torch.device("meta"):
        layer = DraftLayer(DraftLayerConfig.from_dict(raw["layer"]))
    prior = DraftPrior.from_dict(raw["prior"])
    path = folder / DRAFT_NAME
    if not path.is_file():
        raise DeliberateError(f"{path} is missing: the folder has a draft layer configured")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DeliberateError(f"{path} is truncated or not a safetensors file: {error}") from None
    own = layer.state_dict()
    for name in sorted(set(own) | set(state)):
        if name not in state or name not in own or own[name].shape != state[name].shape:
            raise DeliberateError(f"{path}: {name} does not fit the configured draft layer")
        floating = name != "vocabulary"
        finite = bool(state[name].isfinite().all())
        if state[name].is_floating_point() is not floating or not finite:
            raise DeliberateError(f"{path}: {name} holds values that are not of a draft layer")
    vocabulary = state["vocabulary"].to(torch.int64)
    if int(vocabulary[0]) < 0 or bool((vocabulary.diff() <= 0).any()):
        raise DeliberateError(f"{path}: vocabulary must be token ids that rise without repeats")
    layer.load_state_dict(state | {"vocabulary": vocabulary}, assign=True)
    return layer.eval().requires_grad_(False), prior
