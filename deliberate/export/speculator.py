"""`deliberate export speculator`: the draft layer as a folder that vLLM reads.

The folder is of `speculators` (https://github.com/vllm-project/speculators), type ``eagle3``. It
holds what `deliberate.export.eagle3_layout` makes of the layer, and the model's embedding, which
readers share with the full-depth model where it is the same. vLLM hands it the states after three
of the verifier's layers, of which the last counts.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deliberate.api.lookup import weights_alone
from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.weights import is_rms_norm
from deliberate.export.eagle3_layout import eagle3_outputs, eagle3_tensors
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.utils.errors import DeliberateError
from deliberate.utils.folders import output_folder

# Of `speculators`, whose reader the format was checked against, and the drafts of a pass that the
# folder asks for; vLLM's own setting replaces it.
_VERSION, _DRAFTS = "0.9.0", 3
# Entries of the comparison before anything is written, and how far outputs may lie apart in
# float32, in units of their spread.
_TRIED, _TOLERANCE = 24, 1e-3


@dataclass(frozen=True)
class ExportedSpeculator:
    """What was written.

    Attributes:
        path: the folder.
        vocabulary: tokens that can be drafted.
        megabytes: of the folder.
        apart: the largest difference from the draft layer's outputs, in units of their spread.
    """

    path: Path
    vocabulary: int
    megabytes: float
    apart: float


def export_speculator(name: str, out: Path, *, verifier: str) -> ExportedSpeculator:
    """Writes a model's draft layer in EAGLE-3's layout, and compares outputs before.

    Args:
        name: as `AdaptiveModel.from_pretrained` takes it; it has a draft layer.
        out: a new folder.
        verifier: hub name or folder of the whole model as vLLM loads it; it is noted in the folder.

    Raises:
        DeliberateError: `out` exists, no draft layer, or a model that the layout has no room for.
    """
    if out.exists():
        raise DeliberateError(f"out {out} exists: name a new folder")
    output_folder(out.parent)  # reported before the model is loaded
    if not verifier.strip():
        raise DeliberateError("verifier is empty: give the hub name or folder of the whole model")
    with weights_alone():
        model = AdaptiveModel.from_pretrained(name, executor="generic")
    if model.draft is None:
        raise DeliberateError(
            f"{name} has no draft layer: fit one with `deliberate fit {name} out=DIR`, or export "
            "an exit with `deliberate export draft`"
        )
    layer = model.draft.layer
    gain, head = _norm_and_head(model, layer)
    positions = int(getattr(model.base.config, "max_position_embeddings", None) or 2048)
    every = torch.arange(model.backbone.vocab_size)
    with torch.no_grad():
        embedding = model.backbone.embed_tokens(every)
    tensors = eagle3_tensors(layer, gain, head, embedding, positions=positions)
    config = _config(model, layer, positions, verifier)
    apart = _difference(model, layer, tensors, config["transformer_layer_config"])
    if not apart <= _TOLERANCE:
        raise DeliberateError(
            f"the EAGLE-3 layout gives other outputs than the draft layer of {name} (up to "
            f"{apart:.2g} of their spread): it cannot be exported"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in out.iterdir())
    return ExportedSpeculator(out, layer.config.vocabulary, size / 1e6, apart)


def _norm_and_head(model: AdaptiveModel, layer: DraftLayer) -> tuple[Tensor, Tensor]:
    """Gain ``[d]`` of the final norm and the head's rows of the layer's vocabulary, float32."""
    backbone = model.backbone
    norm: Any = backbone.norm
    head: Any = backbone.lm_head
    what = ""
    if not is_rms_norm(norm):
        what = f"a final norm of type {type(norm).__name__}"
    elif not math.isclose(norm.variance_epsilon, layer.config.eps, rel_tol=1e-3):
        what = (
            f"a final norm with epsilon {norm.variance_epsilon:g}, the layer {layer.config.eps:g}"
        )
    elif not (isinstance(head, nn.Linear) and type(head.weight) is nn.Parameter):
        what = f"a head of type {type(head).__name__}"
    elif head.bias is not None:
        what = "a head with a bias"
    elif not _plain_logits(model):
        what = "logits that are scaled or capped"
    if what:
        raise DeliberateError(f"the model has {what}: the EAGLE-3 layout has no room for that")
    return norm.weight.detach().float(), head.weight.detach()[layer.vocabulary].float()


@torch.no_grad()
def _plain_logits(model: AdaptiveModel) -> bool:
    backbone = model.backbone
    state = torch.full((1, backbone.hidden_size), 10.0).to(backbone.lm_head.weight)  # type: ignore[arg-type]
    return torch.equal(backbone.head_logits(state), backbone.lm_head(state))


def _config(
    model: AdaptiveModel, layer: DraftLayer, positions: int, verifier: str
) -> dict[str, Any]:
    """`config.json` of the folder."""
    own, layers = layer.config, model.backbone.num_layers
    architectures = model.base.config.architectures or [type(model.base).__name__]
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": _DRAFTS,
                 "verifier_accept_k": 1, "accept_tolerance": 0.0},
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
        "transformer_layer_config": {
            "model_type": "llama",
            "vocab_size": model.backbone.vocab_size,
            "hidden_size": own.hidden_size,
            "intermediate_size": own.intermediate_size,
            "num_hidden_layers": 2,
            "num_attention_heads": own.heads,
            "num_key_value_heads": own.heads,
            "head_dim": own.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": own.eps,
            "rope_theta": own.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": own.rope_theta},
            "max_position_embeddings": positions,
            "attention_bias": True,
            "mlp_bias": False,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
        "draft_vocab_size": own.vocabulary,
        "target_hidden_size": None,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        # States after so many layers; the matrix `fc` reads the last.
        "eagle_aux_hidden_state_layer_ids": [0, layers // 2, layers],
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }  # fmt: skip


@torch.no_grad()
def _difference(
    model: AdaptiveModel, layer: DraftLayer, tensors: dict[str, Tensor], config: dict[str, Any]
) -> float:
    """The largest difference of outputs over random tokens, in units of their spread."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.backbone.vocab_size, (1, _TRIED + 1), generator=generator)
    states = model(input_ids=ids, output_exit_states=True).last[0, :-1]
    embedded = model.backbone.embed_tokens(ids[0, 1:]).float()
    plain = DraftLayer(layer.config)
    plain.load_state_dict(layer.state_dict())
    joined = plain.join(embedded, model.backbone.norm(states).float())[None]
    places = torch.arange(_TRIED)
    keys, values = plain.keys_values(joined, places)
    later = places > places[:, None]
    attended = plain.attend(plain.queries(joined, places), keys, values, later)
    expected = plain.after_attention(joined, attended)[0]
    found = eagle3_outputs(tensors, config, embedded, states.float())
    return float((found - expected).abs().max() / expected.std())
