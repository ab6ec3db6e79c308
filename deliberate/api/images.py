"""Images in prompts: what a vision-language model's processor gives beside token ids.

`Sight.of` turns a prompt with placeholders into ids in which each placeholder is the id of an
embedding (`deliberate.modeling.seen_rows`). An image that was shown before is not encoded again:
its pixels are hashed, and the ids are those of the first time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.api.generation_args import ARGUMENTS, FIELDS, MODEL_INPUTS
from deliberate.modeling.language_tower import LanguageTower
from deliberate.modeling.seen_rows import positions_of, runs_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import tensors_sha256
from deliberate.utils.weight_watch import WeightWatch, tensors_of

# Prompts' images whose encoding is remembered.
MOST_SHOWN = 256
# What a processor gives beside pixels; they are of use with pixels only.
_KINDS = "mm_token_type_ids"
_ALONGSIDE = (_KINDS, "token_type_ids")


@dataclass(frozen=True)
class _Shown:
    """Images of one call, in the order of their placeholders.

    Attributes:
        ids: of their embeddings.
        placeholders: token ids that placeholders for them.
        runs: lengths of the runs of placeholders.
        placed: their positions are of M-RoPE, and follow from the ids of the prompt.
    """

    ids: tuple[int, ...]
    placeholders: frozenset[int]
    runs: tuple[int, ...]
    placed: bool = False


@dataclass(frozen=True, eq=False)
class Seen:
    """Prompts with images.

    Attributes:
        ids: ``[B, n]``, with the ids of images' embeddings.
        positions: of M-RoPE ``[3, B, n]``; None: 0, 1, 2, ... of each prompt.
        by_ids: positions of each prompt follow from its ids, as an engine places requests.
    """

    ids: Tensor
    positions: Tensor | None = None
    by_ids: bool = False

    def repeated(self, batch: int) -> Tensor:
        """The ids of a batch, into which transformers repeats prompts that several answers are
        wanted of."""
        return self.ids.repeat_interleave(batch // len(self.ids), 0)

    def place(self, mask: Tensor | None) -> Tensor | None:
        """Positions ``[3, n]`` of the prompts, without padding; None where they have no others
        than their ids say.

        Raises:
            DeliberateError: they differ from prompt to prompt and do not follow from ids.
        """
        if self.positions is None:
            return None
        padding = 0 if mask is None else int((mask[0] == 0).sum())
        first = self.positions[:, :1]
        if bool((self.positions != first).any()) or (
            mask is not None and len(set(mask.sum(-1).tolist())) > 1
        ):
            if self.by_ids:
                return None
            raise DeliberateError(
                f"a batch of {len(self.ids)} prompts whose images are placed differently by "
                "M-RoPE, and not one after another: give them one at a time"
            )
        return first[:, 0, padding:]


class Sight:
    """What a vision-language model has been shown; threads may share it.

    Attributes:
        encoded: how often its vision tower was run.
    """

    def __init__(self) -> None:
        self.encoded = 0
        self._shown: OrderedDict[str, _Shown] = OrderedDict()
        self._watch: WeightWatch | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def of(self, tower: LanguageTower, ids: Tensor, mask: Any, images: Mapping[str, Any]) -> Seen:
        """A prompt with the ids of images' embeddings in the places of their placeholders.

        Args:
            ids: with placeholders, padded on the left.
            mask: attention mask ``[B, n]`` or None.
            images: what the processor gave beside these, pixels among it.

        Raises:
            DeliberateError: as `LanguageTower.inputs_of`; or nothing in the prompt stands for them.
        """
        embedding: Any = tower.get_input_embeddings()
        device = embedding.weight.device
        # Which tokens are of an image is of this prompt, the image itself of any.
        kinds = images.get(_KINDS)
        own_pixels = {name: one for name, one in images.items() if name != _KINDS}
        key = f"{tensors_sha256(_named(own_pixels))} {kinds is None}"
        single = len(ids) == 1 and (mask is None or bool(torch.as_tensor(mask).all()))
        weights = tensors_of(tower)[0]
        with self._lock:
            if self._watch is None or self._watch.changed(weights):
                self._shown.clear()
                self._watch = WeightWatch(weights)
            shown = self._shown.get(key)
        if shown is not None:
            places = torch.isin(ids, torch.tensor(sorted(shown.placeholders), device=ids.device))
            lengths = tuple(end - first for _, first, end in runs_of(places))
            alike = kinds is None or torch.equal(torch.as_tensor(kinds).to(places) != 0, places)
            if lengths == shown.runs and alike and tower.seen.knows(min(shown.ids)):
                made = _placed(ids, places, shown.ids)
                if not shown.placed:
                    return Seen(made)
                if single:
                    by_rule = _own_positions(tower, made[0])
                    return Seen(made, None if by_rule is None else by_rule[:, None].to(device))
        given = {"input_ids": ids, "attention_mask": mask, **images}
        given = {
            name: one.to(device) if isinstance(one, Tensor) else one
            for name, one in given.items()
            if one is not None
        }
        embedded, positions = tower.inputs_of(given)
        self.encoded += 1
        plain = embedding(given["input_ids"])
        places = (embedded != plain).any(-1).to(ids.device)
        if not bool(places.any()):
            raise DeliberateError(
                f"{', '.join(images)}: no token of the prompt stands for an image; put the "
                "processor's placeholder where it belongs"
            )
        numbers: list[int] = []
        lengths_: list[int] = []
        for row, first, end in runs_of(places):
            rows = embedded[row, first:end].detach().clone()
            named = {"rows": rows}
            own: Tensor | None = None
            if positions is not None:
                own = positions[:, row, first:end].cpu()
                own = named["places"] = own - own[:, :1].min()
            start = tower.seen.add(tensors_sha256(named), rows, own)
            numbers.extend(range(start, start + end - first))
            lengths_.append(end - first)
        placed_ids = _placed(ids, places, numbers)
        by_ids = positions is not None and _follow(tower, placed_ids, mask, positions)
        seen = Seen(placed_ids, positions, by_ids)
        if positions is not None and not (by_ids and single):
            return seen  # they follow from more than ids: read anew each time
        placeholders = frozenset(ids[places].tolist())
        with self._lock:
            self._shown[key] = _Shown(
                tuple(numbers), placeholders, tuple(lengths_), placed=positions is not None
            )
            while len(self._shown) > MOST_SHOWN:
                self._shown.popitem(last=False)
        return seen


def take_images(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes out of the arguments of `generate` what belongs to images.

    Args:
        base: the wrapped model; only a language tower has any.
        kwargs: changed.

    Raises:
        DeliberateError: images for a model that does not see.
    """
    images = {
        name: one
        for name, one in kwargs.items()
        if isinstance(one, Tensor | list)
        and (name in _ALONGSIDE or not _known(name))
        and ("pixel" in name or "image" in name or "video" in name or name in _ALONGSIDE)
    }
    pixels = [name for name in images if "pixel" in name]
    if not isinstance(base, LanguageTower):
        if pixels:
            raise DeliberateError(
                f"{pixels[0]} is given and {type(base).__name__} reads text alone: wrap a "
                "vision-language model, loaded with AutoModelForImageTextToText"
            )
        return {}
    for name in images:
        del kwargs[name]
    return images if pixels else {}


def seen_prompt(
    model: Any, inputs: Tensor | None, images: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Seen | None:
    """What `generate` was given, as the decoder reads it; None without images.

    Raises:
        DeliberateError: as `Sight.of`.
    """
    if not images:
        return None
    ids: Any = kwargs.get("input_ids") if inputs is None else inputs
    sight: Sight = model.sight
    return sight.of(model.base, ids, kwargs.get("attention_mask"), images)


class SightSurface:
    """The part of `AdaptiveModel` that looks at images."""

    base: Any

    @property
    def sight(self) -> Sight:
        """What was shown to it."""
        held: dict[str, Any] = vars(self)
        sight: Sight = held.setdefault("_sight", Sight())
        return sight

    def see(self, input_ids: Tensor, attention_mask: Tensor | None = None, **images: Any) -> Tensor:
        """Prompt ids for an engine's request, with the ids of images' embeddings in their places.

            ids = model.see(**processor(text=text, images=[image], return_tensors="pt"))
            engine.add(Request(ids[0], max_new_tokens=64))

        Prompts that begin with the same text and image share its keys and values where an engine's
        cache is in blocks. `generate` takes what the processor gives as it is.

        Args:
            input_ids: with the processor's placeholders, ``[B, n]``, padded on the left.
            attention_mask: ``[B, n]`` or None.
            **images: what the processor gave beside these, pixels among it.

        Raises:
            DeliberateError: the model reads text alone, or images are not supported for it.
        """
        given = take_images(self.base, dict(images))
        if set(given) != set(images) or not given:
            other = sorted(set(images) - set(given))
            what = f"{other[0]} is no input of images" if other else "no pixels are given"
            raise DeliberateError(f"see: {what}; give what the model's processor returned")
        seen = self.sight.of(self.base, input_ids, attention_mask, given)
        if seen.positions is not None:
            # A request has ids alone: its positions must follow from them.
            own = _own_positions(self.base, seen.ids[0])
            if len(seen.ids) > 1 or own is None or not torch.equal(seen.positions[:, 0].cpu(), own):
                raise DeliberateError(
                    f"{type(self.base.seeing).__name__} places the images of this prompt, or a "
                    "batch or padding, otherwise than one after another: use model.generate"
                )
        return seen.ids


def _known(name: str) -> bool:
    return name in ARGUMENTS or name in MODEL_INPUTS or name in FIELDS


def _named(images: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the inputs by a name of its own."""
    found: dict[str, Tensor] = {}
    for name, one in images.items():
        parts = one if isinstance(one, list) else [one]
        for place, part in enumerate(parts):
            found[f"{name} {place}"] = part if isinstance(part, Tensor) else torch.tensor(part)
    return found


def _own_positions(tower: LanguageTower, ids: Tensor) -> Tensor | None:
    """Positions ``[axes, n]`` of a prompt ``[n]``, by its ids alone."""
    numbers: list[int] = ids.tolist()
    return positions_of(numbers, tower.seen.hold(numbers))


def _follow(tower: LanguageTower, ids: Tensor, mask: Any, positions: Tensor) -> bool:
    """Whether every prompt's positions, without padding, are those that its ids give."""
    for row, own in enumerate(ids):
        padding = 0 if mask is None else int((torch.as_tensor(mask[row]) == 0).sum())
        found = positions[:, row, padding:].cpu()
        by_rule = _own_positions(tower, own[padding:])
        if by_rule is None:  # no image in this one
            by_rule = torch.arange(found.shape[1]).expand_as(found)
        if not torch.equal(found, by_rule):
            return False
    return True


def _placed(ids: Tensor, places: Tensor, numbers: Any) -> Tensor:
    made = ids.clone()
    made[places] = torch.tensor(list(numbers), dtype=ids.dtype, device=ids.device)
    return made
