"""Hidden states of a model's own text, on disk in bfloat16.

Translators and draft layers are fitted to the same hidden states many times over; the backbone is
run for them once. A folder holds the tokens, one file of states for each chosen layer, and a
description that is written last, so that what was interrupted is continued where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read_json

META_NAME, TOKENS_NAME = "meta.json", "tokens.int32"
# Texts after which the description is written.
_SAVE_EVERY = 16


@dataclass(frozen=True)
class Text:
    """Where one text lies in the cache.

    Attributes:
        start: of its tokens and states among all of them.
        length: tokens, the prompt included.
        prompt: tokens of the prompt; nothing is fitted on them, attention sees them.
    """

    start: int
    length: int
    prompt: int

    def __post_init__(self) -> None:
        if self.start < 0 or not 0 <= self.prompt <= self.length:
            raise DeliberateError(
                f"a text of {self.length} tokens at {self.start} with a prompt of {self.prompt}: "
                "the prompt is part of the text"
            )


def bytes_per_token(layers: int, hidden_size: int) -> int:
    """Bytes on disk of one token: bfloat16 states of each layer, and an int32 id."""
    return layers * hidden_size * 2 + 4


class HiddenCache:
    """A folder of hidden states, read through memory maps.

    Args:
        folder: what `collect` wrote.

    Attributes:
        layers: number of layers below each kept state, rising.
        hidden_size: width d of a state.
        source: what identifies the model and the text.
        texts: where each text lies.

    Raises:
        DeliberateError: a folder that `collect` did not write, or a file that is too short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / META_NAME).is_file():
            raise DeliberateError(f"{folder} has no {META_NAME}: it is no cache of hidden states")
        meta = read_json(folder / META_NAME)
        self.layers: tuple[int, ...] = tuple(meta["layers"])
        self.hidden_size = int(meta["hidden_size"])
        self.source: dict[str, object] = meta["source"]
        self.texts = [Text(*one) for one in meta["texts"]]
        self.complete = bool(meta["complete"])
        for name, width in [(TOKENS_NAME, 4)] + [
            (_states_name(layer), 2 * self.hidden_size) for layer in self.layers
        ]:
            path = folder / name
            if not path.is_file() or path.stat().st_size < self.count * width:
                raise DeliberateError(f"{path} is shorter than {META_NAME} says: collect it anew")

    @property
    def count(self) -> int:
        """Tokens of all texts."""
        return self.texts[-1].start + self.texts[-1].length if self.texts else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk of one token."""
        return bytes_per_token(len(self.layers), self.hidden_size)

    def tokens(self) -> Tensor:
        """Ids of all texts, int64 ``[N]``."""
        ids = np.fromfile(self.folder / TOKENS_NAME, dtype=np.int32, count=self.count)
        return torch.from_numpy(ids.astype(np.int64))

    def states(self, layer: int) -> Tensor:
        """States after so many layers, bfloat16 ``[N, d]``, mapped and not read yet.

        Raises:
            DeliberateError: a layer that was not kept.
        """
        if layer not in self.layers:
            raise DeliberateError(
                f"states after layer {layer} are not in {self.folder}: it has {list(self.layers)}"
            )
        size = self.count * self.hidden_size
        path = str(self.folder / _states_name(layer))
        mapped = torch.from_file(path, shared=False, size=size, dtype=torch.bfloat16)
        return mapped.view(self.count, self.hidden_size)


@torch.inference_mode()
def collect(
    folder: Path,
    backbone: Backbone,
    texts: Iterable[tuple[Sequence[int], int]],
    layers: Sequence[int],
    *,
    source: dict[str, object],
    most_tokens: int,
    note: Callable[[int], None] = lambda tokens: None,
) -> HiddenCache:
    """Runs the model over its texts and keeps the states after some layers.

    Continues a folder that was interrupted, and starts anew where it is of another model or text.

    Args:
        backbone: the model's layers.
        texts: token ids and the length of the prompt of each, in an order that does not change.
        layers: number of layers below each state to keep, rising; the last may be all of them.
        source: JSON-ready facts that identify model and text.
        most_tokens: texts are taken until they have so many tokens.
        note: called with the tokens so far, after each text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder, layers, source)
    where = done.texts if done is not None else []
    total = done.count if done is not None else 0
    files = [(folder / TOKENS_NAME, 4)]
    files += [(folder / _states_name(layer), 2 * backbone.hidden_size) for layer in layers]
    handles = []
    for path, width in files:
        path.touch()
        handle = path.open("r+b")
        handle.truncate(total * width)
        handle.seek(0, 2)
        handles.append(handle)

    def save(*, complete: bool) -> None:
        for handle in handles:
            handle.flush()
        meta = {
            "layers": list(layers),
            "hidden_size": backbone.hidden_size,
            "source": source,
            "complete": complete,
            "texts": [[one.start, one.length, one.prompt] for one in where],
        }
        write_text(folder / META_NAME, json.dumps(meta) + "\n")

    try:
        for index, (ids, prompt) in enumerate(texts):
            if total >= most_tokens:
                break
            if index < len(where):
                continue
            states = run_text(backbone, ids, layers)
            handles[0].write(np.asarray(ids, dtype=np.int32).tobytes())
            for handle, state in zip(handles[1:], states, strict=True):
                handle.write(state.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
            where.append(Text(total, len(ids), prompt))
            total += len(ids)
            note(total)
            if len(where) % _SAVE_EVERY == 0:
                save(complete=False)
        save(complete=True)
    finally:
        for handle in handles:
            handle.close()
    return HiddenCache(folder)


def run_text(backbone: Backbone, ids: Sequence[int], layers: Sequence[int]) -> list[Tensor]:
    """States ``[n, d]`` of one text after each of these numbers of layers."""
    cache = backbone.new_cache(len(ids))
    ctx = backbone.context(0, len(ids), device=backbone.device)
    hidden = backbone.embed(torch.tensor([list(ids)], device=backbone.device), ctx)
    states = []
    for first, last in pairwise((0, *layers)):
        hidden = backbone.run_layers(hidden, first, last, ctx, cache)
        states.append(hidden[0].clone())
    return states


def _states_name(layer: int) -> str:
    return f"states-{layer}.bf16"


def _done(folder: Path, layers: Sequence[int], source: dict[str, object]) -> HiddenCache | None:
    """What the folder holds of the same model and text, or None."""
    try:
        held = HiddenCache(folder)
    except DeliberateError:
        return None
    return held if held.layers == tuple(layers) and held.source == source else None
