"""Writes a Llama, Mistral, Qwen2 or Qwen3 model with its tokenizer as a GGUF file, for llama.cpp.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, by the package `gguf`. As in
llama.cpp's own conversion, rows of queries and keys of Llama and Mistral lie in pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deliberate.api.gguf_blocks import LAYER_NAMES, PAIRED_ROWS
from deliberate.installation import install_extra
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file
from deliberate.utils.json_files import parse_json

DTYPES = ("f32", "f16", "bf16", "q8_0")
_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
_NORMAL, _CONTROL = 1, 3  # kinds of tokens in the file


def check_dtype(dtype: str) -> None:
    """Raises DeliberateError unless matrices can be written so."""
    if dtype not in DTYPES:
        raise DeliberateError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def write_gguf(
    model: PreTrainedModel,
    tokenizer: Any,
    path: Path,
    *,
    dtype: str = "f16",
    pre: str | None = None,
    name: str = "",
) -> None:
    """Writes the file, whole or not at all.

    Args:
        tokenizer: of transformers, byte-level BPE.
        dtype: of matrices, one of `DTYPES`; norms and biases stay float32. A matrix whose rows are
            no multiple of 32 numbers is written in f16 where q8_0 is asked for.
        pre: llama.cpp's name of how text is cut before BPE (``tokenizer.ggml.pre``); None finds it
            for the tokenizers of GPT-2, SmolLM and Qwen2.
        name: of the model, for people.

    Raises:
        DeliberateError: another family, rotary frequencies or sliding windows that the file cannot
            say, a tokenizer that is not byte-level BPE, an unknown dtype, or no package `gguf`.
    """
    check_dtype(dtype)
    gguf = _package()
    config: Any = model.config
    if config.model_type not in PAIRED_ROWS:
        raise DeliberateError(
            f"a {config.model_type!r} is not written as GGUF: {', '.join(PAIRED_ROWS)} are; "
            "without .gguf at the end of out it is written as a Hugging Face folder"
        )
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        raise DeliberateError(
            f"rope_type {rope['rope_type']!r} is not written as GGUF: default is; without .gguf at "
            "the end of out the model is written as a Hugging Face folder"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise DeliberateError(
            f"sliding_window {config.sliding_window} is not written as GGUF: llama.cpp would "
            "attend to every token; without .gguf at the end of out it is written as a Hugging "
            "Face folder"
        )
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    pre = pre or _pre(vocabulary["pre_tokenizer"])
    paired = PAIRED_ROWS[config.model_type]
    # llama.cpp runs a Mistral as a Llama.
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    with atomic_file(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        _add_sizes(writer, config, rope, name)
        _add_tokenizer(writer, vocabulary, tokenizer, pre)
        for key, value in model.state_dict().items():
            theirs = _their_name(key)
            if theirs == "output.weight" and config.tie_word_embeddings:
                continue
            heads = _rotary_heads(theirs, config) if paired else 0
            _add_tensor(gguf, writer, theirs, _in_pairs(value, heads) if heads else value, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise DeliberateError(
            f"writing GGUF needs the package `gguf`: {install_extra('gguf')}"
        ) from None
    return gguf


def _add_sizes(writer: Any, config: Any, rope: dict[str, Any], name: str) -> None:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_name(name or "a model of deliberate")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)


def _vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The tokenizer's own JSON, and its tokens in the order of their ids under ``tokens``."""
    whole = parse_json(tokenizer.backend_tokenizer.to_str(), "the tokenizer")
    model = whole["model"]
    parts = json.dumps(whole.get("pre_tokenizer"))
    if model.get("type") != "BPE" or "ByteLevel" not in parts:
        raise DeliberateError(
            f"a tokenizer of type {model.get('type')!r} is not written as GGUF: byte-level BPE is"
        )
    tokens = {index: (token, _NORMAL) for token, index in model["vocab"].items()}
    for added in whole.get("added_tokens", ()):
        kind = _CONTROL if added["special"] else _NORMAL
        tokens[added["id"]] = (added["content"], kind)
    whole["tokens"] = [tokens.get(index, (f"[unused{index}]", _CONTROL)) for index in range(rows)]
    return whole  # type: ignore[no-any-return]


def _pre(pre_tokenizer: Any) -> str:
    """llama.cpp's name of a way to cut text before BPE."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer]
    kinds = [part.get("type") for part in parts]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    split = parts[0].get("pattern", {}).get("Regex", "") if kinds[0] == "Split" else ""
    if kinds == ["Split", "ByteLevel"] and r"|\p{N}|" in split:
        return "qwen2"
    raise DeliberateError(
        f"how this tokenizer cuts text ({', '.join(map(str, kinds))}) has no name in llama.cpp "
        "that this release knows: give --pre NAME, the one of llama.cpp's conversion"
    )


def _add_tokenizer(writer: Any, vocabulary: dict[str, Any], tokenizer: Any, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary["tokens"]])
    writer.add_token_types([kind for _, kind in vocabulary["tokens"]])
    merges = vocabulary["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    ids = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, add in ids.items():
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            add(number)
    begins = bool(tokenizer.encode("a")[:1] == [tokenizer.bos_token_id])
    writer.add_add_bos_token(begins)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _their_name(ours: str) -> str:
    module, _, part = ours.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{part}"
    if module.startswith("model.layers."):
        number, _, rest = module.removeprefix("model.layers.").partition(".")
        if rest in _LAYER:
            return f"blk.{number}.{_LAYER[rest]}.{part}"
    raise DeliberateError(f"{ours} has no name in a GGUF file of this family")


def _rotary_heads(name: str, config: Any) -> int:
    """Heads whose rows of this tensor are rotated; 0 for none."""
    stem = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stem, 0)


def _in_pairs(x: Tensor, heads: int) -> Tensor:
    """Row ``j * half + i`` of every head at ``2 i + j``, as llama.cpp rotates them."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tensor(gguf: Any, writer: Any, name: str, value: Tensor, dtype: str) -> None:
    array = np.ascontiguousarray(value.detach().to(torch.float32).cpu().numpy())
    kinds = gguf.GGMLQuantizationType
    kind = kinds[dtype.upper()] if array.ndim > 1 else kinds.F32
    if kind == kinds.Q8_0 and array.shape[-1] % 32:
        kind = kinds.F16
    if kind == kinds.F32:
        writer.add_tensor(name, array)
    elif kind == kinds.F16:
        writer.add_tensor(name, array.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
