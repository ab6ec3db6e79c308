"""GGUF files as base models: dequantised, or read in place (weights="file").

Dequantised, weights are widened when the file is loaded: memory and time are those of the dtype
asked for, not of the file's 4 or 8 bits. In place, the file is mapped to memory and the C++ kernels
read its blocks (`deliberate.api.gguf_blocks`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deliberate.api.gguf_blocks import config_of, load_blocks, load_widened
from deliberate.api.gguf_file import GgufFile
from deliberate.installation import install_extra
from deliberate.utils.errors import DeliberateError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(source: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return Path(source).suffix.lower() == SUFFIX


def load_gguf(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model of a GGUF file, dequantised.

    Args:
        source: the file; families that transformers' reader knows (Llama, Mistral, Qwen2, Qwen3,
            Gemma 3, ...).
        **kwargs: passed to `AutoModelForCausalLM.from_pretrained`; ``dtype`` is what the weights
            are widened to.

    Raises:
        DeliberateError: no such file, a foreign one, or the package `gguf` is missing.
        Exception: whatever transformers raises for a truncated or unknown file.
    """
    path = _checked(source)
    kwargs.pop("revision", None)
    plain = set(kwargs) <= {"dtype", "attn_implementation"}
    if plain and kwargs.get("dtype") in ("float32", torch.float32):
        widened = load_widened(path, kwargs.get("attn_implementation"))
        if widened is not None:
            return widened
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **kwargs)
    # It is a plain model now; marked as a quantised one it could be neither moved nor saved.
    for holder in (model.config, model):
        for name in ("quantization_config", "_model_name_or_path", "quantization_method"):
            holder.__dict__.pop(name, None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = model.name_or_path = str(path)
    loaded: PreTrainedModel = model
    return loaded


def load_gguf_in_file(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model of a GGUF file whose matrices stay in it; see `deliberate.api.gguf_blocks`.

    Raises:
        DeliberateError: as `load_gguf`, and what `load_blocks` refuses.
    """
    return load_blocks(_checked(source), **kwargs)


def load_gguf_config(source: str | Path) -> Any:
    """The configuration of a GGUF file's model; raises as `load_gguf` does."""
    return config_of(GgufFile(_checked(source)))


def load_gguf_tokenizer(source: str | Path) -> Any:
    """The tokenizer that a GGUF file holds; raises as `load_gguf` does."""
    path = _checked(source)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _checked(source: str | Path) -> Path:
    path = Path(source)
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise DeliberateError(f"{path} cannot be read: {error.strerror}") from None
    if magic != _MAGIC:
        raise DeliberateError(f"{path} is no GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
    try:
        import gguf  # noqa: F401  (transformers' reader needs it)
    except ImportError:
        raise DeliberateError(
            f"reading {path} needs the package `gguf`: {install_extra('gguf')}"
        ) from None
    return path
