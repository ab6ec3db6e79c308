"""The model of a GGUF file, a tensor at a time: its matrices in blocks, or widened to float32.

Blocks of Q4_0, Q4_1 and Q8_0 are laid out in panels as they are read, each weight to the last
bit (`deliberate.kernels.block_panels`), and the file's pages are released; Q4_K and Q6_K stay in
the file as it is mapped to memory. The configuration comes from transformers' reader, as when a
file is dequantised. Rows of queries and keys, which llama.cpp keeps in pairs for Llama and Mistral,
stay so where they stay in the file: the kernels put their outputs where transformers has them
(`BlockPart.rotary`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deliberate.api.gguf_file import BLOCKS, FLOATS, GgufFile, GgufTensor
from deliberate.kernels.block_panels import in_panels
from deliberate.kernels.blocks import BlockPart
from deliberate.modeling.block_modules import BlockEmbedding, BlockLinear, has_blocks
from deliberate.utils.errors import DeliberateError

# Names of a layer's tensors in the file, and of the modules; the last two are Qwen3's.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# Model types whose matrices may stay in a file, and whether their query and key rows lie in pairs.
PAIRED_ROWS = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}


def load_blocks(path: Path, **kwargs: Any) -> PreTrainedModel:
    """The model of a GGUF file, its matrices in blocks.

    Args:
        path: a file of the Llama, Mistral, Qwen2 or Qwen3 family with matrices in Q8_0, Q4_0, Q4_1,
            Q4_K or Q6_K; matrices in floating point are copied as float32.
        **kwargs: ``dtype`` float32, and ``attn_implementation``.

    Raises:
        DeliberateError: another family or format, a tensor that is missing, or another argument.
    """
    dtype = kwargs.pop("dtype", torch.float32)
    attention = kwargs.pop("attn_implementation", None)
    kwargs.pop("revision", None)
    if dtype not in (torch.float32, "float32"):
        raise DeliberateError(f"dtype={dtype} with weights='file': states are float32")
    if kwargs:
        name, value = next(iter(kwargs.items()))
        raise DeliberateError(f"{name}={value!r} with weights='file': it is not taken there")
    file = GgufFile(path)
    config = config_of(file)
    kind = str(config.model_type)
    if kind not in PAIRED_ROWS:
        raise DeliberateError(
            f"{path} is of the {kind} family: weights='file' reads {', '.join(PAIRED_ROWS)}; load "
            "it without weights='file'"
        )
    model = _model(file, config, attention, widen=False)
    if not has_blocks(model):
        raise DeliberateError(f"{path} holds no blocks: load it without weights='file'")
    return model


def load_widened(path: Path, attention: str | None = None) -> PreTrainedModel | None:
    """The model of a GGUF file in float32, widened a tensor at a time.

    Transformers' reader holds the whole model twice while it loads. Every weight is the same.

    Args:
        attention: ``attn_implementation``, None: transformers' choice.

    Returns:
        None where transformers' reader is needed: for another family than those of `load_blocks`,
        or a format that is not read here.
    """
    try:
        file = GgufFile(path)
        known = all(one.kind in FLOATS or one.kind in BLOCKS for one in file.tensors.values())
        config = config_of(file) if known else None
    except DeliberateError:  # transformers says what is wrong with it, or reads it all the same
        return None
    if config is None or str(config.model_type) not in PAIRED_ROWS:
        return None
    return _model(file, config, attention, widen=True)


def _model(file: GgufFile, config: Any, attention: str | None, *, widen: bool) -> PreTrainedModel:
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
    _fill(model, _Reader(file, widen), paired=PAIRED_ROWS[str(config.model_type)])
    model.config._name_or_path = model.name_or_path = str(file.path)
    loaded: PreTrainedModel = model.eval()
    return loaded


@dataclass(frozen=True)
class _Reader:
    """A file, and whether its blocks are widened.

    Attributes:
        file: the file.
        widen: to float32.
    """

    file: GgufFile
    widen: bool

    def found(self, name: str) -> GgufTensor:
        """A tensor of this name.

        Raises:
            DeliberateError: there is none.
        """
        try:
            return self.file.tensors[name]
        except KeyError:
            raise DeliberateError(f"{self.file.path} has no tensor {name}") from None

    def floats(self, weight: GgufTensor) -> Tensor | None:
        """Its values, or None where it is kept in blocks."""
        if not self.widen:
            return weight.floats
        made = weight.widened()
        self.file.release()
        return made


def config_of(file: GgufFile) -> Any:
    """The configuration as transformers reads it from the file's scalars."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.gguf").write_bytes(file.scalars())
        try:
            config: Any = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
        except (ValueError, KeyError, IndexError) as error:
            raise DeliberateError(
                f"{file.path}: transformers makes no configuration of it: {error}"
            ) from None
    # The model's name in the file is no folder; as where a file is dequantised.
    config.__dict__.pop("_model_name_or_path", None)
    config.tie_word_embeddings = "output.weight" not in file.tensors
    return config


def _fill(model: Any, reader: _Reader, *, paired: bool) -> None:
    config, file = model.config, reader.file
    base = model.model
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    embedding = _embedding(reader, reader.found("token_embd.weight"), config)
    _replace(base, "embed_tokens", embedding)
    head = file.tensors.get("output.weight")
    if head is not None:
        _replace(model, "lm_head", _linear(reader, head, None, model.lm_head))
    elif isinstance(embedding, BlockEmbedding):
        _replace(model, "lm_head", BlockLinear(embedding.blocks.parts[0], config.hidden_size))
    else:
        model.lm_head.weight = embedding.weight
    _set(base.norm, "weight", reader.found("output_norm.weight").floats)
    for index, layer in enumerate(base.layers):
        for theirs, ours in LAYER_NAMES.items():
            place, _, name = ours.rpartition(".")
            holder = layer.get_submodule(place)
            module = getattr(holder, name, None)
            if module is None:
                continue
            prefix = f"blk.{index}.{theirs}"
            weight = reader.found(f"{prefix}.weight")
            if not isinstance(module, nn.Linear):
                _set(module, "weight", weight.floats)
                continue
            bias = None
            if module.bias is not None:
                bias = reader.found(f"{prefix}.bias").floats
            pairs = heads.get(theirs, 0) if paired else 0
            _replace(holder, name, _linear(reader, weight, bias, module, pairs))
    rotary = type(base.rotary_emb)(config=config)
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None and factors.floats is not None:
        # Llama 3's longer context: the file has it as a divisor of each frequency.
        rotary.inv_freq = rotary.inv_freq / factors.floats
    _replace(base, "rotary_emb", rotary)
    named = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, one in named if one.is_meta]
    if left:
        raise DeliberateError(f"{file.path} lacks {left[0]} of {config.model_type}")


def _embedding(reader: _Reader, weight: GgufTensor, config: Any) -> nn.Module:
    values = reader.floats(weight)
    if values is None:
        return BlockEmbedding(_part(reader.file, weight), weight.shape[-1])
    padding = config.pad_token_id
    return nn.Embedding.from_pretrained(values, freeze=not reader.widen, padding_idx=padding)


def _part(file: GgufFile, weight: GgufTensor, rotary: int = 0) -> BlockPart:
    """Blocks of a tensor as the kernels multiply them fastest."""
    part = BlockPart(weight.data, weight.format, rotary)
    lying = in_panels(part)
    if lying is not part:
        file.release()  # what was copied would else count as this process's memory
    return lying


def _linear(
    reader: _Reader, weight: GgufTensor, bias: Tensor | None, like: nn.Linear, pairs: int = 0
) -> nn.Module:
    """A linear layer in the place of another; rows of `pairs` heads lie in pairs."""
    rows, columns = weight.shape
    if (rows, columns) != (like.out_features, like.in_features):
        raise DeliberateError(
            f"tensor {weight.name} is {rows} x {columns}: the configuration says "
            f"{like.out_features} x {like.in_features}"
        )
    rotary = rows // pairs if pairs else 0
    if bias is not None and rotary:
        bias = _unpaired(bias, rotary)
    values = reader.floats(weight)
    if values is None:
        return BlockLinear(_part(reader.file, weight, rotary), columns, bias)
    made = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    _set(made, "weight", _unpaired(values, rotary) if rotary else values)
    if bias is not None:
        _set(made, "bias", bias)
    return made


def _unpaired(x: Tensor, rotary: int) -> Tensor:
    """Rows ``2 i + j`` of every head at ``j * rotary / 2 + i``."""
    return x.unflatten(0, (-1, rotary // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _set(module: nn.Module, name: str, value: Tensor | None) -> None:
    if value is None or value.shape != getattr(module, name).shape:
        raise DeliberateError(
            f"a GGUF file's {type(module).__name__}: {name} is not in floats, or of another size"
        )
    setattr(module, name, nn.Parameter(value))


def _replace(holder: nn.Module, name: str, module: nn.Module) -> None:
    setattr(holder, name, module)
