"""Reading and writing adaptive models on disk, with errors that name the file.

A folder holds `adaptive_config.json` (exits, gate, base model, format version) and
`exits.safetensors`, with a deliberation gate also `gate.safetensors`, with a draft layer
`draft.safetensors`; a merged one also the base
model's own files. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from deliberate.api.draft_files import base_sample, draft_settings, save_draft
from deliberate.api.fetch import FETCHABLE, fetched, place_of
from deliberate.api.gguf import is_gguf, load_gguf, load_gguf_in_file, load_gguf_tokenizer
from deliberate.executors.quantization import Storage, as_storage
from deliberate.modeling.block_modules import refuse_saving
from deliberate.modeling.language_tower import language_tower, sees
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file, write_text
from deliberate.utils.json_files import build_from, read_json

CONFIG_NAME = "adaptive_config.json"
EXITS_NAME = "exits.safetensors"
GATE_NAME = "gate.safetensors"
# What PEFT calls the description of an adapter, and the exits beside it.
ADAPTER_NAME = "adapter_config.json"
ADAPTER_EXITS_NAME = "exits.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SavedConfig:
    """Content of `adaptive_config.json`."""

    exits: Mapping[str, Any]
    base: str
    base_revision: str | None = None
    gate: Mapping[str, Any] | None = None
    draft: Mapping[str, Any] | None = None
    base_sample: str | None = None


def bundled_models() -> list[str]:
    """Names of the checkpoints inside the package."""
    root = resources.files("deliberate.checkpoints")
    return sorted(e.name for e in root.iterdir() if e.is_dir() and (e / CONFIG_NAME).is_file())


def _bundled(name: str) -> Path:
    return Path(str(resources.files("deliberate.checkpoints") / name))


def _lasting_name(base: str) -> str:
    """How to refer to a base model: the package's folder may move, a bundled name does not."""
    for name in bundled_models():
        if Path(base) == _bundled(name):
            return name
    for name in FETCHABLE:
        if Path(base) == place_of(name):
            return name
    return base


def resolve(name_or_path: str | Path) -> str:
    """Folder of a bundled model, a fetched or given GGUF file, a folder, or a hub name as it is.

    Raises:
        DeliberateError: none of these.
    """
    text = str(name_or_path)
    # A bundled name is that model wherever the command runs; ./NAME is the folder.
    if text in bundled_models() and not isinstance(name_or_path, Path):
        return str(_bundled(text))
    if text in FETCHABLE and not isinstance(name_or_path, Path):
        return str(fetched(text))
    if Path(text).is_dir() or (is_gguf(text) and Path(text).is_file()):
        return text
    if is_gguf(text):
        raise DeliberateError(f"model {text!r} is missing: there is no such GGUF file")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise DeliberateError(
            f"model {text!r} is neither a folder nor a GGUF file, nor bundled "
            f"({', '.join(bundled_models())}), nor fetched by `deliberate fetch` "
            f"({', '.join(FETCHABLE)}), nor a hub name of the form owner/name"
        )
    return text


def read_adaptive_config(source: str) -> SavedConfig | None:
    """The adaptive configuration in a folder, or None for a stock checkpoint."""
    path = Path(source) / CONFIG_NAME
    if not path.is_file():
        return None
    raw = read_json(path)
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise DeliberateError(f"{path} was not written by deliberate: it has no format_version")
    if raw["format_version"] != FORMAT_VERSION:
        raise DeliberateError(
            f"{path} has format_version {raw['format_version']}; this release reads "
            f"{FORMAT_VERSION}"
        )
    saved = build_from(
        SavedConfig, {k: v for k, v in raw.items() if k != "format_version"}, str(path)
    )
    base = source if saved.base == "." else saved.base
    if base in bundled_models():
        base = str(_bundled(base))
    elif base in FETCHABLE:
        base = str(fetched(base))
    return dataclasses.replace(saved, base=base)


def adapter_base(source: str) -> str | None:
    """The base model that an adapter folder names, or None where the folder holds no adapter.

    Raises:
        DeliberateError: an adapter's description that cannot be read or names no base model.
    """
    path = Path(source) / ADAPTER_NAME
    # A folder that is also a whole checkpoint is loaded as that.
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    raw = read_json(path)
    base = raw.get("base_model_name_or_path") if isinstance(raw, dict) else None
    if not isinstance(base, str) or not base:
        raise DeliberateError(
            f"{path} names no base model: set base_model_name_or_path to its folder or hub name"
        )
    return base


def load_base(source: str, *, weights: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """The transformers model of a folder, GGUF file or hub name; float32 unless told otherwise.

    Args:
        weights: with "file" the matrices of a GGUF file stay there; others are the executor's.
    """
    in_file = weights is not None and as_storage(weights) is Storage.FILE
    if in_file and not is_gguf(source):
        raise DeliberateError(f"weights='file' needs a GGUF file: {source} is none")
    kwargs.setdefault("dtype", "float32")
    if kwargs.get("revision") is None:
        kwargs.pop("revision", None)
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DeliberateError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    try:
        if is_gguf(source):
            return load_gguf_in_file(source, **kwargs) if in_file else load_gguf(source, **kwargs)
        return language_tower(_auto_class(source, kwargs).from_pretrained(source, **kwargs))
    except DeliberateError:
        raise
    except Exception as error:  # what a malformed config.json raises has any type
        raise DeliberateError(
            f"cannot load a causal language model from {source}: {_first_line(error)}"
        ) from None


def _auto_class(source: str, kwargs: Mapping[str, Any]) -> Any:
    """The class that loads a checkpoint: of models that read images, one that keeps their eyes."""
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    config = AutoConfig.from_pretrained(source, **revision)
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    named = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return named + lines[0][:300] if lines else type(error).__name__


def load_exits(source: str, exits: nn.Module) -> None:
    """Fills the exit modules from a folder's `exits.safetensors`, all of them or an error."""
    _load(Path(source) / EXITS_NAME, exits, "exits")


def load_gate(source: str, gate: nn.Module) -> None:
    """Fills the deliberation gate from a folder's `gate.safetensors`, all of it or an error."""
    _load(Path(source) / GATE_NAME, gate, "gate")


def _load(path: Path, module: nn.Module, what: str) -> None:
    if not path.is_file():
        raise DeliberateError(f"{path} is missing: the folder has {what} configured but no weights")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DeliberateError(f"{path} is truncated or not a safetensors file: {error}") from None
    own = module.state_dict()
    for name in sorted(set(own) | set(state)):
        if name not in state:
            raise DeliberateError(f"{path} lacks {name}: it belongs to other {what}")
        if name not in own:
            raise DeliberateError(f"{path} has {name}, which the configured {what} do not have")
        if own[name].shape != state[name].shape:
            raise DeliberateError(
                f"{path}: {name} has shape {list(state[name].shape)}, "
                f"the model needs {list(own[name].shape)}"
            )
        if name == "vocabulary":
            ids = state[name]
            if ids.is_floating_point() or int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
                raise DeliberateError(
                    f"{path}: vocabulary must be token ids that rise without repeats"
                )
            continue
        if not (state[name].is_floating_point() and bool(state[name].isfinite().all())):
            raise DeliberateError(
                f"{path}: {name} holds {str(state[name].dtype).removeprefix('torch.')} with values "
                "that are no finite floats: train or save the model again"
            )
    # Left in the file, mapped, where nothing has to be converted: what no request reads takes no
    # memory. What is written to it is this process's own.
    same = all(own[name].dtype is one.dtype and own[name].is_cpu for name, one in state.items())
    module.load_state_dict(state, assign=same)


def save(model: ModelView, folder: str | Path, *, merge: bool) -> None:
    """Writes `model` to `folder`; each file appears whole or not at all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    base_name = getattr(model.base.config, "_name_or_path", "") or ""
    if merge:
        refuse_saving(model.base)
        model.base.save_pretrained(target)
    elif not base_name:
        raise DeliberateError(
            "the base model has no name to refer to (it was not loaded from a checkpoint): "
            "save with merge=True"
        )
    config = {
        "format_version": FORMAT_VERSION,
        "base": "." if merge else _lasting_name(base_name),
        "base_revision": None if merge else getattr(model.base.config, "_commit_hash", None),
        "exits": model.exit_config.to_dict(),
    }
    _write_tensors(target / EXITS_NAME, model.exits)
    if model.gate is not None:
        config["gate"] = model.gate.config.to_dict()
        _write_tensors(target / GATE_NAME, model.gate)
    draft = model.draft
    if draft is not None:
        config["draft"] = draft_settings(draft.layer, draft.prior)
        sample = None if merge else base_sample(model.backbone)
        if sample is not None:
            config["base_sample"] = sample
    save_draft(target, None if draft is None else draft.layer)
    write_text(target / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    if model.gate is None:
        (target / GATE_NAME).unlink(missing_ok=True)  # of a model saved here before


def _write_tensors(path: Path, module: nn.Module) -> None:
    """A module's tensors as a file that appears whole or not at all."""
    state = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    with atomic_file(path) as partial:
        save_file(state, partial, metadata={"format": "pt"})


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a model folder (of its base, where the folder has none), or hub name."""
    source = _with_tokenizer(name_or_path)
    try:
        return (
            load_gguf_tokenizer(source)
            if is_gguf(source)
            else AutoTokenizer.from_pretrained(source)
        )
    except DeliberateError:
        raise
    except Exception as error:  # what malformed files raise has any type
        raise DeliberateError(
            f"cannot load a tokenizer from {source}: {_first_line(error)}"
        ) from None


def load_processor(name_or_path: str | Path) -> Any:
    """The processor of a vision-language model: its tokenizer, and what reads images.

    Raises:
        DeliberateError: it cannot be loaded, or reads no images.
    """
    source = _with_tokenizer(name_or_path)
    try:
        made = AutoProcessor.from_pretrained(source)
    except Exception as error:  # what malformed files raise has any type
        raise DeliberateError(
            f"cannot load an image processor from {source}: {_first_line(error)}"
        ) from None
    if getattr(made, "image_processor", None) is None:
        raise DeliberateError(
            f"{source} has no image processor: save the model's processor there "
            "(processor.save_pretrained)"
        )
    return made


def _with_tokenizer(name_or_path: str | Path) -> str:
    """Where the tokenizer of a model lies: its own folder, or that of its base."""
    source = resolve(name_or_path)
    saved = read_adaptive_config(source)
    if (Path(source) / "tokenizer_config.json").is_file():
        return source
    return saved.base if saved is not None else adapter_base(source) or source
