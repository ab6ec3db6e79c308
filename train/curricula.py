"""Which exits are trained at which step, and how strongly layers drop out: pure functions.

LayerSkip (Elhoushi et al., 2024, arXiv:2404.16710) does not train every exit at every step. The
*rotational* curriculum trains every R-th exit, shifted by one each step; the *gradual* one starts
with the deepest exit and adds one at a time over the first half of the run. The last layer is
always trained. The weights of the active exits and the last layer are scaled to sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

from deliberate.utils.errors import DeliberateError

E = TypeVar("E", bound=StrEnum)


class ExitCurriculum(StrEnum):
    """Which exits a step trains."""

    ALL = "all"
    ROTATIONAL = "rotational"
    GRADUAL = "gradual"


class DropoutSchedule(StrEnum):
    """How layer dropout grows with time."""

    CONSTANT = "constant"
    EXPONENTIAL = "exponential"  # LayerSkip's, for training from scratch


def rotational(step: int, exits: int, *, interval: int) -> tuple[bool, ...]:
    """Every `interval`-th of the exits, shifted by one exit each step.

    Over any `interval` consecutive steps each exit is active exactly once.
    """
    if interval < 1:
        raise DeliberateError(f"rotation interval {interval} must be at least 1")
    return tuple(index % interval == step % interval for index in range(exits))


def gradual(step: int, steps: int, exits: int, *, share: float = 0.5) -> tuple[bool, ...]:
    """The deepest exit from the start, and one more every ``share * steps / exits`` steps.

    All are active from step ``share * steps`` on; an active exit stays active.
    """
    if not 0.0 <= share <= 1.0:
        raise DeliberateError(f"gradual share {share} is outside [0, 1]")
    until_all = share * steps
    on = exits if step >= until_all else min(exits, 1 + int(step * exits / until_all))
    return tuple(index >= exits - on for index in range(exits))


def active_exits(
    kind: ExitCurriculum | str,
    step: int,
    steps: int,
    exits: int,
    *,
    interval: int = 2,
    share: float = 0.5,
) -> tuple[bool, ...]:
    """Which of `exits` exits, shallow to deep, optimizer step `step` of `steps` trains.

    Raises:
        DeliberateError: an unknown curriculum, an interval below 1, a share outside [0, 1].
    """
    chosen = _member(ExitCurriculum, kind, "exit curriculum")
    if chosen is ExitCurriculum.ROTATIONAL:
        return rotational(step, exits, interval=interval)
    if chosen is ExitCurriculum.GRADUAL:
        return gradual(step, steps, exits, share=share)
    return (True,) * exits


def curriculum_weights(weights: Sequence[float], active: Sequence[bool]) -> list[float]:
    """The weights of the active exits and of the last layer, scaled to sum to 1; the others 0."""
    if len(weights) != len(active) + 1:
        raise DeliberateError(
            f"{len(weights)} weights for {len(active)} exits and the last layer: give one for each"
        )
    kept = [w if on else 0.0 for w, on in zip(weights, (*active, True), strict=True)]
    total = sum(kept)
    return [weight / total for weight in kept]


def dropout_scale(kind: DropoutSchedule | str, step: int, steps: int) -> float:
    """Factor on all layer dropout rates at `step`: 1, or 2^(step/(steps-1)) - 1 from 0 to 1."""
    if _member(DropoutSchedule, kind, "dropout schedule") is DropoutSchedule.CONSTANT:
        return 1.0
    return 2.0 ** (min(step, steps - 1) / (steps - 1)) - 1.0 if steps > 1 else 1.0


def _member(kind: type[E], value: str, name: str) -> E:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member) for member in kind)
        raise DeliberateError(f"{name} {value!r} is unknown; it is one of {choices}") from None
