"""Where the exits of a model are and how they decide: what `save_pretrained` writes of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from deliberate.config import member_of
from deliberate.modeling.measures import measure_named
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import OrInfinity, build_from

DEFAULT_THRESHOLD = 0.9


class Translator(StrEnum):
    """The map from an exit's normed hidden state to that of the last layer."""

    NONE = "none"
    LOW_RANK = "low_rank"
    FULL = "full"


def auto_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Exits after about 1/6, 1/3 and 7/12 of the layers; fewer in a shallow model.

    The earliest saves the most layers; three keep the cost of evaluating heads small.
    """
    if num_layers < 2:
        raise DeliberateError(
            f"the model has {num_layers} layer(s): early exits need at least 2, one below the last"
        )
    wanted = {max(1, round(num_layers * share)) for share in (1 / 6, 1 / 3, 7 / 12)}
    return tuple(sorted(layer for layer in wanted if layer < num_layers))


def check_exit_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The exits as a tuple, if they are rising layer counts within 1..num_layers-1.

    Exit e is after e layers, so e = num_layers would be the model's own head, which is not listed.
    """
    given = list(layers)
    if not given:
        raise DeliberateError("exit layers are empty: name at least one, or use 'auto'")
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise DeliberateError(
                f"exit layer {layer!r} is not a whole number: give layer counts such as [5, 10]"
            )
        if not 1 <= layer < num_layers:
            raise DeliberateError(
                f"exit layer {layer}: the model has {num_layers} layers; "
                f"use numbers from 1 to {num_layers - 1}"
            )
    if sorted(set(given)) != given:
        raise DeliberateError(
            f"exit layers {given} must rise without repeats: give {sorted(set(given))}"
        )
    return tuple(given)


@dataclass(frozen=True)
class ExitConfig:
    """Exits of one model, in the order of depth.

    Attributes:
        layers: exit e is after e decoder layers; rising, each below the number of layers.
        thresholds: least confidence at which a token exits, one per exit, each in (0, 1], or
            infinity (null in files): no token exits there and the exit is not evaluated. 1.0 is not
            that: a confidence can be 1 by rounding.
            Entropy is turned into a confidence: 1 - entropy / log(vocabulary).
        measure: the confidence measure of all exits, a name in
            `deliberate.modeling.measures.MEASURES`.
        translator: ``none``, ``low_rank`` (identity plus rank ``rank``) or ``full``.
        max_pending: tokens that may be pending (deeper layers not yet run) before a full-depth pass
            is forced.
        vocabulary: rows of the head that the exits read, of the tokens that `ExitHeads.vocabulary`
            lists (a draft vocabulary); 0 for all. A token outside it cannot exit early.
    """

    layers: tuple[int, ...]
    thresholds: tuple[OrInfinity, ...]
    measure: str = "max_prob"
    translator: Translator = Translator.LOW_RANK
    rank: int = 32
    max_pending: int = 12
    vocabulary: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "thresholds", _numbers(self.thresholds))
        measure_named(self.measure)
        object.__setattr__(self, "translator", member_of(Translator, self.translator, "translator"))
        if len(self.thresholds) != len(self.layers):
            raise DeliberateError(
                f"{len(self.thresholds)} thresholds for {len(self.layers)} exits: give one per exit"
            )
        for threshold in self.thresholds:
            if not (0.0 < threshold <= 1.0 or threshold == math.inf):
                raise DeliberateError(
                    f"threshold {threshold} is outside (0, 1]; infinity means that no token exits"
                )
        for name, value in (("translator rank", self.rank), ("max_pending", self.max_pending)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeliberateError(f"{name} {value!r} must be a whole number of at least 1")
        rows = self.vocabulary
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0 or rows == 1:
            raise DeliberateError(
                f"exit vocabulary {rows!r} must be a whole number of at least 2, or 0 for all"
            )

    @classmethod
    def build(
        cls,
        num_layers: int,
        layers: Sequence[int] | Literal["auto"] = "auto",
        thresholds: Sequence[float] | float = DEFAULT_THRESHOLD,
        **settings: Any,
    ) -> ExitConfig:
        """A checked configuration for a model of ``num_layers``; one threshold serves all exits."""
        if isinstance(layers, str):
            if layers != "auto":
                raise DeliberateError(f"exit layers {layers!r}: give a list of layers or 'auto'")
            chosen = auto_exit_layers(num_layers)
        else:
            chosen = check_exit_layers(layers, num_layers)
        if isinstance(thresholds, int | float):
            thresholds = [float(thresholds)] * len(chosen)
        return cls(layers=chosen, thresholds=tuple(thresholds), **settings)

    def with_thresholds(self, thresholds: Sequence[float] | float) -> ExitConfig:
        """The same exits at other thresholds."""
        if isinstance(thresholds, int | float):
            thresholds = [float(thresholds)] * len(self.layers)
        return dataclasses.replace(self, thresholds=tuple(thresholds))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        raw = dataclasses.asdict(self)
        thresholds = [None if math.isinf(value) else value for value in self.thresholds]
        if not self.vocabulary:  # as earlier releases wrote it
            del raw["vocabulary"]
        return raw | {
            "layers": list(self.layers),
            "thresholds": thresholds,
            "translator": str(self.translator),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, num_layers: int) -> ExitConfig:
        """Reads `to_dict`'s form and checks it against the model at hand.

        Raises:
            DeliberateError: a missing or unknown key, a wrong type, or a value out of range.
        """
        if not isinstance(raw, Mapping):
            raise DeliberateError(f"exit settings: expected an object, found {raw!r:.60}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise DeliberateError(
                f"unknown exit setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        missing = sorted({"layers", "thresholds"} - set(raw))
        if missing:
            raise DeliberateError(f"exit settings lack {missing[0]!r}")
        config = build_from(cls, dict(raw), "exit settings")
        check_exit_layers(config.layers, num_layers)
        return config


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        return tuple(math.inf if value is None else float(value) for value in values)
    except (TypeError, ValueError):
        raise DeliberateError(
            f"thresholds {values!r:.60}: give one number in (0, 1] for each exit"
        ) from None
