"""`deliberate export draft`: an exit, or the whole, as a model of its own on disk."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from deliberate.api import checkpoint
from deliberate.api.gguf import is_gguf
from deliberate.api.lookup import weights_alone
from deliberate.api.model import AdaptiveModel
from deliberate.export.exit_model import chosen_exit, exit_model
from deliberate.export.gguf_writer import check_dtype, write_gguf
from deliberate.utils.errors import DeliberateError
from deliberate.utils.folders import output_folder


@dataclass(frozen=True)
class ExportedDraft:
    """What was written.

    Attributes:
        path: the folder or the GGUF file.
        layer: the exit's.
        layers: of the whole model.
        megabytes: of the folder or file.
    """

    path: Path
    layer: int
    layers: int
    megabytes: float


def export_draft(
    name: str,
    out: Path,
    *,
    layer: int | None = None,
    dtype: str | None = None,
    pre: str | None = None,
) -> ExportedDraft:
    """Writes the layers up to an exit and its head as a Hugging Face folder or a GGUF file.

    Args:
        name: bundled name, folder, fetched name, GGUF file or hub name of an adaptive model.
        out: a new folder, or a file that ends in ``.gguf``.
        layer: the exit's; the shallowest one by default. The last layer is the whole model.
        dtype, pre: as `write_gguf`; for a GGUF file only.

    Raises:
        DeliberateError: a model, exit or setting that cannot be exported, or `out` exists.
    """
    into_gguf = is_gguf(out)
    if out.exists():
        raise DeliberateError(f"out {out} exists: name a new {'file' if into_gguf else 'folder'}")
    output_folder(out.parent)  # a place that cannot be written is reported before loading too
    for option, value in (("dtype", dtype), ("pre", pre)):
        if value is not None and not into_gguf:
            raise DeliberateError(
                f"{option} {value!r} is for GGUF files: {out} does not end in .gguf"
            )
    check_dtype(dtype or "f16")  # a typo is reported before the model is loaded
    with weights_alone():
        model = AdaptiveModel.from_pretrained(name, executor="generic")
    layers = model.backbone.num_layers
    if layer == layers:  # what verifies the drafts, in the same form
        depth, shallow, title = layers, model.base, Path(name).name
    else:
        index = chosen_exit(model, layer)
        depth = model.exit_config.layers[index]
        shallow = exit_model(model, index)
        title = f"exit after layer {depth} of {Path(name).name}"
    tokenizer = checkpoint.load_tokenizer(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    if into_gguf:
        write_gguf(shallow, tokenizer, out, dtype=dtype or "f16", pre=pre, name=title)
        size = out.stat().st_size
    else:
        _write_folder(shallow, tokenizer, out)
        size = sum(path.stat().st_size for path in out.iterdir())
    return ExportedDraft(out, depth, layers, size / 1e6)


def _write_folder(shallow: PreTrainedModel, tokenizer: object, out: Path) -> None:
    """The folder appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        shallow.save_pretrained(partial)
        tokenizer.save_pretrained(partial)  # type: ignore[attr-defined]
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
