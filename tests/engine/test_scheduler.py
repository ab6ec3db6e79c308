"""When a batch's deep passes are run."""

from __future__ import annotations

import pytest

from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.sequence import DecodingSequence
from deliberate.utils.errors import DeliberateError


def batch(*waited: int | None) -> list[DecodingSequence]:
    """Sequences that have waited for so many passes; None: not blocked."""
    made = [DecodingSequence(index, [], 3, 4) for index in range(len(waited))]
    for sequence, passes in zip(made, waited, strict=True):
        sequence.blocked, sequence.waited = passes is not None, passes or 0
    return made


@pytest.mark.parametrize(
    ("waited", "due"),
    [
        ((None, None, None, None), False),
        ((0, None, None, None), False),
        ((0, 0, None, None), True),  # exactly the share
        ((2, None, None, None), False),
        ((3, None, None, None), True),  # exactly the longest wait
        ((0,), True),
    ],
)
def test_a_deep_pass_is_due_at_the_share_of_blocked_sequences_or_the_longest_wait(waited, due):
    assert DeepSchedule(fullness=0.5, max_wait=3).is_due(batch(*waited)) is due


@pytest.mark.parametrize(
    "wrong", [{"fullness": 0.0}, {"fullness": 1.1}, {"max_wait": -1}, {"join": 0.0}]
)
def test_impossible_schedules_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(DeliberateError, match=f"schedule {name} {value}"):
        DeepSchedule(**wrong)
