"""Writes small models as GGUF files with quantised matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from quantised import random_part

from deliberate.kernels.block_quantise import quantise_blocks
from deliberate.kernels.blocks import BlockFormat

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def in_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves interleaved, as llama.cpp keeps query and key rows."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(model: Any, path: Path, formats: dict[str, BlockFormat | None]) -> Path:
    """A model's file.

    Args:
        formats: by the end of a tensor's name in the file without ``.weight``; "" is for the
            others; None writes floats. Q8_0 and Q4_1 are rounded from the model's weights; of the
            others the blocks are random, since nothing here rounds to them.
    """
    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, "llama" if kind == "mistral" else kind)
    writer.add_name("a mistral" if kind == "mistral" else "small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for name, value in model.state_dict().items():
        theirs = _their_name(name)
        if theirs is None or (theirs == "output.weight" and config.tie_word_embeddings):
            continue
        array = value.float().numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        part = theirs.split(".")[-2].removeprefix("attn_")
        if kind in ("llama", "mistral") and part in heads:
            array = in_pairs(array, heads[part])
        _add(writer, theirs, np.ascontiguousarray(array), formats)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, array: np.ndarray, formats: dict[str, BlockFormat | None]) -> None:
    stem = name.removesuffix(".weight")
    named = [ends for ends in formats if ends and stem.endswith(ends)]
    chosen = formats[named[0]] if named else formats[""]
    if array.ndim < 2 or chosen is None:
        writer.add_tensor(name, array)
        return
    if chosen in (BlockFormat.Q8_0, BlockFormat.Q4_1):
        part = quantise_blocks(torch.from_numpy(array), chosen)
    else:
        part = random_part(*array.shape, chosen, seed=len(name))
    kind = gguf.GGMLQuantizationType(int(chosen))
    writer.add_tensor(name, part.data.numpy(), raw_dtype=kind)


def _their_name(ours: str) -> str | None:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if ours in whole:
        return whole[ours]
    if not ours.startswith("model.layers."):
        return None
    _, _, layer, *rest = ours.split(".")
    return f"blk.{layer}.{_LAYER['.'.join(rest[:-1])]}.{rest[-1]}"
