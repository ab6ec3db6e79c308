"""Seeds: no two commands draw the same generated problems."""

from __future__ import annotations

from itertools import combinations

import pytest

from deliberate.data import seeds
from deliberate.utils.errors import DeliberateError


def ends(one: seeds.SeedRange) -> tuple[int, int]:
    """The first seed, and the one after the last."""
    return one.of(0, "a test"), one.of(one.count - 1, "a test") + 1


@pytest.mark.parametrize("table", [seeds.WORD_PROBLEMS, seeds.REASONING_GYM], ids=["words", "gym"])
def test_the_ranges_of_all_users_are_disjoint_for_the_seeds_allowed(table):
    for (one, first), (other, second) in combinations(table.items(), 2):
        (a, b), (c, d) = ends(first), ends(second)
        assert b <= c or d <= a, f"{one} and {other} share seeds"


def test_items_of_a_gym_set_end_below_those_of_training():
    last = max(ends(one)[1] for one in seeds.REASONING_GYM.values())
    assert last * seeds.GYM_STRIDE <= seeds.GYM_TRAINING_OFFSET


def test_thresholds_and_weights_of_one_run_see_other_draws():
    assert seeds.THRESHOLD_OFFSET > 0 > seeds.TOKENIZER_SEED


@pytest.mark.parametrize("seed", [-1, 40, True, 1.0, "0"])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(DeliberateError, match=r"must be in 0\.\.39 for calibration"):
        seeds.REASONING_GYM[seeds.CALIBRATION].of(seed, "calibration")
