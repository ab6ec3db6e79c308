"""What `deliberate bench agreement` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deliberate.eval.benchmarks.agreement_thresholds import Agreement
from deliberate.eval.statistics import Estimate
from deliberate.eval.tasks.held_out_loss import TextLoss


@dataclass(frozen=True)
class Measured:
    """One model's figures.

    Attributes:
        label: ``model`` or ``baseline``.
        name: what was loaded.
        thresholds: chosen on the first half, with every exit evaluated; infinity where none is high
            enough.
        figures: of the second half, under `thresholds`.
        asked: thresholds of the timed modes: infinity at exits that would lose time. A key of the
            file.
        dropped: why those are not evaluated, in words.
        decoding: figures of the second half under `requested`.
        free: share of a mode's own tokens that the full depth would have chosen after the same
            text, on the timed sequences.
        loss: of the held-out texts or solutions, where any fit the context.
    """

    label: str
    name: str
    layers: tuple[int, ...]
    num_layers: int
    executor: str
    thresholds: tuple[float, ...]
    figures: Agreement
    requested: tuple[float, ...]
    dropped: tuple[str, ...]
    decoding: Agreement
    free: Mapping[str, Estimate]
    loss: TextLoss | None
