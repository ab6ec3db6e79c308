"""Weights of the Llama family in the form the fused executor reads: QKV in one, gate and up in one.

Nothing is held twice: unless told otherwise, the model's own parameters become views of the joined
matrices (same values, same `Parameter` objects), so training, saving and the generic executor go
on with the same memory. A matrix stored smaller (`deliberate.executors.quantization`) is a copy
beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deliberate.cache.attention_metadata import SLIDING
from deliberate.executors.fused.structure import hooked
from deliberate.executors.quantization import (
    Storage,
    Stored,
    WeightPlan,
    joined,
    store,
)
from deliberate.kernels.blocks import BlockWeight
from deliberate.modeling.architectures import ARCHITECTURES
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.block_modules import BlockLinear, has_blocks
from deliberate.utils.errors import DeliberateError
from deliberate.utils.resident import trim_heap

FUSED_ARCHITECTURES = tuple(name for name, one in ARCHITECTURES.items() if one.fused)


class LayerWeights(NamedTuple):
    """One decoder layer. Biases ``[N]`` and head norms ``[head_dim]`` are None where it has none.

    ``qkv`` ``[(heads + 2 kv_heads) * head_dim, d]``, ``out`` ``[d, heads * head_dim]``, ``gate_up``
    ``[2 ff, d]`` (gate first), ``down`` ``[d, ff]``, norms ``[d]``.
    """

    attention_norm: Tensor
    qkv: Stored
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Stored
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Stored
    gate_up_bias: Tensor | None
    down: Stored
    down_bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes read by one pass."""
        return sum(part.nbytes for part in self if part is not None)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Numbers that a layer's arithmetic needs beside its weights."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    eps: float
    head_eps: float
    window: int | None


def plan_for(
    model: nn.Module,
    num_layers: int,
    weights: str | Mapping[str, Sequence[int]] | WeightPlan | None = None,
    head: str | None = None,
) -> WeightPlan:
    """As `WeightPlan.build`; a model with weights in a file keeps them there.

    Raises:
        DeliberateError: as there; ``"file"`` for another model, or anything else for this one.
    """
    in_file = has_blocks(model)
    if in_file and weights is None and head is None:
        weights = Storage.FILE
    plan = WeightPlan.build(num_layers, weights, head)
    if in_file != (Storage.FILE in (*plan.layers, plan.head)):
        loaded, how = "its weights stay in a GGUF file", "leave weights out"
        if not in_file:
            loaded = "the model is in memory"
            how = "load a GGUF file by AdaptiveModel.from_pretrained('model.gguf', weights='file')"
        raise DeliberateError(f"weights {plan.described}: {loaded}; {how}")
    return plan


def stored(linear: nn.Module, storage: Storage, *, panels: bool = False) -> Stored:
    """The weight of a linear layer as it is kept; `panels` as in `store`."""
    if isinstance(linear, BlockLinear):
        return linear.blocks
    weight: Any = linear.weight
    return store(weight, storage, panels=panels)


def unsupported(backbone: Backbone) -> str | None:
    """Why the fused executor cannot run this model, or None where it can."""
    if backbone.architecture not in FUSED_ARCHITECTURES:
        return (
            f"architecture {backbone.architecture} is not one of {', '.join(FUSED_ARCHITECTURES)}"
        )
    config = backbone.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    for index, layer in enumerate(backbone.layers):
        reason = _unsupported_layer(layer)
        if reason is not None:
            return f"layer {index} {reason}"
    if not _plain(backbone.lm_head) or backbone.lm_head.bias is not None:
        return "its head is not a plain linear layer"
    if not is_rms_norm(backbone.norm):
        return f"its final norm is {type(backbone.norm).__name__}"
    parts = {"head": backbone.lm_head, "final norm": backbone.norm}
    parts["embedding"] = backbone.model.get_input_embeddings()
    for name, part in parts.items():
        if hooked(part):
            return f"its {name} has a hook"
    devices = {parameter.device for parameter in backbone.model.parameters()}
    dtypes = {parameter.dtype for parameter in backbone.layers.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        return f"its weights are on {', '.join(sorted(map(str, devices)))}"
    if len(dtypes) > 1:
        return f"its layers mix {', '.join(sorted(map(str, dtypes)))}"
    return None


def layer_shapes(backbone: Backbone) -> tuple[LayerShape, ...]:
    """The shape of every layer."""
    shapes = []
    for layer, kind in zip(backbone.layers, backbone.layer_types, strict=True):
        attention: Any = layer.self_attn
        head_dim = int(attention.head_dim)
        query_norm = getattr(attention, "q_norm", None)
        norm: Any = layer.input_layernorm
        eps = float(norm.variance_epsilon)
        shapes.append(
            LayerShape(
                heads=attention.q_proj.out_features // head_dim,
                kv_heads=attention.k_proj.out_features // head_dim,
                head_dim=head_dim,
                scaling=float(attention.scaling),
                eps=eps,
                head_eps=eps if query_norm is None else float(query_norm.variance_epsilon),
                window=int(backbone.config.sliding_window) if kind == SLIDING else None,
            )
        )
    return tuple(shapes)


def fuse_layers(
    backbone: Backbone, plan: WeightPlan, *, share: bool = True, panels: bool = False
) -> tuple[LayerWeights, ...]:
    """Joins the weights of every layer, one layer at a time, so the peak is one layer more.

    Args:
        share: make the model's parameters views of the joined matrices, which then cost no memory.
            Without it they are copies: the weights of the layers are held twice.
        panels: as in `store`.
    """
    made = []
    # Outside inference mode, or the weights could never be trained or compiled with again.
    with torch.inference_mode(False), torch.no_grad():
        for layer, storage in zip(backbone.layers, plan.layers, strict=True):
            made.append(_fuse_layer(layer, storage, share, panels))
            if storage is not Storage.FILE:
                trim_heap()  # the parts are smaller than what the next layer joins
    return tuple(made)


def fingerprint(weights: Iterable[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    """Changes when one of these weights is moved or written in place."""
    return tuple((p.data_ptr(), edits(p)) for p in weights)


def edits(weight: Tensor) -> int:
    """How often a tensor was written in place; 0 where torch does not count (inference tensors)."""
    try:
        return weight._version
    except RuntimeError:
        return 0


def places(weights: Iterable[nn.Parameter]) -> tuple[int, ...]:
    """Changes when one is moved to other memory, not when it is written in place."""
    return tuple(p.data_ptr() for p in weights)


def watched(backbone: Backbone) -> Iterator[nn.Parameter]:
    """The parameters that the executor reads: of the layers, the final norm and the head."""
    yield from backbone.layers.parameters()
    yield from backbone.norm.parameters()
    yield from backbone.lm_head.parameters()


def _fuse_layer(layer: Any, storage: Storage, share: bool, panels: bool) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    qkv, qkv_bias = _join(projections, storage, share, panels)
    gate_up, gate_up_bias = _join((mlp.gate_proj, mlp.up_proj), storage, share, panels)
    out, down = attention.o_proj, mlp.down_proj
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        query_norm=_optional_weight(getattr(attention, "q_norm", None)),
        key_norm=_optional_weight(getattr(attention, "k_norm", None)),
        out=stored(out, storage, panels=panels),
        out_bias=_detached(out.bias),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=stored(down, storage, panels=panels),
        down_bias=_detached(down.bias),
    )


def _join(
    linears: Sequence[nn.Linear], storage: Storage, share: bool, panels: bool
) -> tuple[Stored, Tensor | None]:
    """The matrices of several layers over the same input as one, and their biases as one."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _joined(biases, share) if biases else None
    apart = storage.in_blocks or (panels and storage is not Storage.NATIVE)
    blocks = [stored(one, storage, panels=panels) for one in linears] if apart else []
    in_blocks = [one for one in blocks if isinstance(one, BlockWeight)]
    if in_blocks:
        if len(in_blocks) < len(blocks):
            raise DeliberateError("a GGUF file has parts of a layer in blocks and others in floats")
        return joined(in_blocks), bias
    as_it_is = storage in (Storage.NATIVE, Storage.FILE)
    weight = _joined([linear.weight for linear in linears], share and as_it_is)
    return store(weight, storage), bias


def _joined(parts: Sequence[Tensor], share: bool) -> Tensor:
    """One tensor of all parts; those that are its views already are not copied again."""
    first = parts[0]
    whole = first.data
    size = sum(part.shape[0] for part in parts)
    expected = first.data_ptr()
    adjacent = True
    for part in parts:
        adjacent &= part.data_ptr() == expected and part.is_contiguous()
        adjacent &= part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        expected += part.nbytes
    if adjacent:
        return whole.as_strided((size, *first.shape[1:]), first.stride(), whole.storage_offset())
    whole = torch.cat([part.data for part in parts])
    if share:
        start = 0
        for part in parts:
            part.data = whole[start : start + part.shape[0]]
            start += part.shape[0]
    return whole


def _unsupported_layer(layer: Any) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {
        **{name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{name: getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")},
    }
    for name, linear in linears.items():
        if not _plain(linear):
            return f"has a {name} that is not a plain linear layer ({type(linear).__name__})"
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if len({linears[name].bias is None for name in names}) > 1:
            return f"has a bias in some of {', '.join(names)} only"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if not is_rms_norm(norm):
            return f"has a norm of type {type(norm).__name__}"
    for module in layer.modules():
        if hooked(module):
            return f"has a hook on its {type(module).__name__}"
    return None


def _plain(linear: Any) -> bool:
    """Exactly nn.Linear with ordinary weights, or blocks: no adapter, no quantised class."""
    ordinary = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return ordinary or type(linear) is BlockLinear


def is_rms_norm(norm: Any) -> bool:
    """Whether a module is an RMS norm with ``weight`` and ``variance_epsilon``."""
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def _optional_weight(norm: Any) -> Tensor | None:
    return None if norm is None else norm.weight.detach()


def _detached(bias: nn.Parameter | None) -> Tensor | None:
    return None if bias is None else bias.detach()
