"""Which seeds each command draws generated problems with: one table, so that no two share any.

A command's `seed` is added to an offset of its own. Offsets are far enough apart that the ranges
of two commands never meet for the seeds that are allowed; a test checks that over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from deliberate.utils.errors import DeliberateError

EVALUATION, CALIBRATION = "evaluation", "calibration"
DECODE_BENCHMARK, BUDGET_BENCHMARK = "decode benchmark", "budget benchmark"
GATE_BENCHMARK, LONG_TEXT_BENCHMARK = "gate benchmark", "long text benchmark"
THROUGHPUT_BENCHMARK, SERVING_BENCHMARK = "throughput benchmark", "serving benchmark"
TRAINING = "training"


@dataclass(frozen=True)
class SeedRange:
    """The seeds ``offset + seed`` of one command, for ``seed`` in ``0 .. count - 1``.

    Attributes:
        offset: added to the command's `seed`.
        count: how many values of `seed` are allowed.
    """

    offset: int
    count: int

    def of(self, seed: int, user: str) -> int:
        """The seed to draw with.

        Raises:
            DeliberateError: `seed` is not allowed: its range is another command's.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < self.count:
            raise DeliberateError(
                f"seed={seed!r} must be in 0..{self.count - 1} for {user}: other seeds are drawn "
                "by other commands"
            )
        return self.offset + seed


_MILLION = 1_000_000
WORD_PROBLEMS = {
    EVALUATION: SeedRange(0, _MILLION),
    DECODE_BENCHMARK: SeedRange(1_000_003, _MILLION),
    CALIBRATION: SeedRange(2_000_003, _MILLION),
    BUDGET_BENCHMARK: SeedRange(3_000_003, _MILLION),
    GATE_BENCHMARK: SeedRange(4_000_003, _MILLION),
    LONG_TEXT_BENCHMARK: SeedRange(5_000_003, _MILLION),
    THROUGHPUT_BENCHMARK: SeedRange(6_000_003, _MILLION),
    SERVING_BENCHMARK: SeedRange(7_000_003, _MILLION),
}
"""Word problems of the test split. Training draws from the other side of `split_of`, a hash of the
question, so it shares no problem with any of these whatever its seed is."""

GYM_STRIDE = 100_000
"""Items of a reasoning-gym set that one seed may draw: item i of a set is drawn from
``GYM_STRIDE * seed + i``."""
REASONING_GYM = {EVALUATION: SeedRange(0, 60), CALIBRATION: SeedRange(60, 40)}
"""In units of `GYM_STRIDE`. A benchmark answers the problems of an evaluation."""
GYM_TRAINING_OFFSET = 10_000_000
"""Training draws item i from ``GYM_TRAINING_OFFSET + seed + i``, above all of `REASONING_GYM`; it
also keeps only its own side of `split_of`."""

THRESHOLD_OFFSET = 1_000_003
"""Thresholds are chosen on training batches of ``THRESHOLD_OFFSET + seed``: on draws that the
weights were not trained on."""
TOKENIZER_SEED = -1
"""Of the word problems (train split) that a new tokenizer is trained on."""
