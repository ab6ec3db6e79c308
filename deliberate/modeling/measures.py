"""Confidence measures: what an exit's threshold is compared with. One entry of `MEASURES` each.

Training, thresholds, calibration, decoding and the command line read this table, so that a measure
of one's own is one more entry. A measure of the exit's logits needs no more than its function;
executors that compute it inside a kernel need their own form of it and refuse a measure without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deliberate.kernels.ops.exit_head import (
    HeadReading,
    normalised_certainty,
    top_margin,
    top_probability,
)
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True, slots=True)
class Measure:
    """One confidence measure.

    Attributes:
        name: in configurations and files.
        score: logits ``[..., V]`` -> the most likely token ``[...]`` and its confidence ``[...]``,
            in [0, 1]. Of a measure that is taken before the head, only the token is used.
        before_head: the confidence is the exit's linear probe on the normed hidden state; the head
            is run only for tokens that reach the threshold.
        from_head: the same confidence, float32 ``[R]``, from the statistics that the operator
            `deliberate.kernels.ops.exit_head.read_head` returns and the vocabulary size. The CUDA
            executor needs it. None where these statistics do not determine the measure.
        cpp_statistic: number of the confidence in the C++ kernels (`Reading.statistic`); None where
            they do not compute it.

    Raises:
        DeliberateError: a name that is no plain word.
    """

    name: str
    score: Callable[[Tensor], tuple[Tensor, Tensor]]
    before_head: bool = False
    from_head: Callable[[HeadReading, int], Tensor] | None = None
    cpp_statistic: int | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise DeliberateError(
                f"measure name {self.name!r}: use letters, digits and underscores, as in max_prob"
            )

    @property
    def known_to_cuda(self) -> bool:
        """Whether the CUDA executor's kernels compute it."""
        return self.before_head or self.from_head is not None

    @property
    def known_to_cpp(self) -> bool:
        """Whether the C++ kernels compute it."""
        return self.before_head or self.cpp_statistic is not None


MAX_PROB = Measure(
    "max_prob",
    top_probability,
    from_head=lambda reading, _vocab_size: reading.probability(),
    cpp_statistic=0,
)
MARGIN = Measure(
    "margin",
    top_margin,
    from_head=lambda reading, _vocab_size: reading.margin(),
    cpp_statistic=1,
)
ENTROPY = Measure(
    "entropy",
    normalised_certainty,
    from_head=lambda reading, vocab_size: reading.certainty(vocab_size),
    cpp_statistic=2,
)
GATE = Measure("gate", top_probability, before_head=True)

MEASURES: dict[str, Measure] = {one.name: one for one in (MAX_PROB, MARGIN, ENTROPY, GATE)}


def measure_named(name: str) -> Measure:
    """The entry of a name.

    Raises:
        DeliberateError: there is none; the line lists those that there are.
    """
    found = MEASURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise DeliberateError(f"measure {name!r} is unknown; it is one of {', '.join(MEASURES)}")
    return found


def require_known(measure: Measure, executor: str, known: Callable[[Measure], bool]) -> None:
    """Refuses a measure that an executor cannot compute.

    Args:
        executor: what it is called in the error.
        known: whether it computes a measure.

    Raises:
        DeliberateError: it does not; the line lists those that it computes.
    """
    if not known(measure):
        names = ", ".join(one.name for one in MEASURES.values() if known(one))
        raise DeliberateError(
            f"measure {measure.name!r} is not computed by {executor} (they compute {names}): "
            "use one of these, or executor='generic'"
        )
