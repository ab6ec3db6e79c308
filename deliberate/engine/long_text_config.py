"""When a generation is watched for repetition, and how its logits are re-weighed then."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class LongTextConfig:
    """When a generation is re-weighed, and how; see docs/longtext.md for how these were chosen.

    Attributes:
        window: states that the statistic is taken over; it is defined after as many tokens.
        threshold: unexplained share of the variance below which it triggers; 0: never, 4: always.
            Good text of the models that were measured has medians of 0.3 to 0.8, loops below 0.1.
        tokens: how many are re-weighed from a trigger on; a trigger meanwhile restarts the count.
        strength: nats that the token after an identical state loses.
        sharpness: how fast that fades: exp(-sharpness * (1 - cosine)).

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    window: int = 16
    threshold: float = 0.2
    tokens: int = 16
    strength: float = 6.0
    sharpness: float = 16.0

    def __post_init__(self) -> None:
        for name in ("window", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeliberateError(
                    f"long_text {name} {value!r} must be a whole number of at least 1"
                )
        for name in ("threshold", "strength", "sharpness"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DeliberateError(f"long_text {name} {value!r} must be a number")
            if not (math.isfinite(value) and value >= 0):
                raise DeliberateError(f"long_text {name} {value!r} must be finite and at least 0")
