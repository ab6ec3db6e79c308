"""The planner of exact mode where sequences share passes: what an exit above the first saves."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.draft_planner import FIRST_FULL, DraftPlanner
from deliberate.engine.loop_settings import LoopSettings

READ, FIXED = 1e-6, (1e-3, 2e-3, 4e-3)


def planner(rows: int, exits: float) -> DraftPlanner:
    """Two exits at which this share of the tokens exits; passes of so many rows have been timed."""
    made = DraftPlanner(2, 8, [READ, READ])
    for _ in range(FIRST_FULL):
        made.token_fed()
    for tokens in (1, 2, 4, 8) * 3:
        for index, fixed in enumerate(FIXED):
            made.segment(index, rows, rows * tokens, fixed + 1e-5 * rows * tokens)
    for turn in range(100):
        for index in range(2):
            made.evaluated(index, turn < 100 * exits)
            if turn < 100 * exits:
                made.verified(index, True)
    return made


def test_the_pass_above_a_later_exit_is_saved_only_where_no_sequence_stays_in_it():
    for rows, first, later in (
        (1, 6e-3, 4e-3),
        (2, 6e-3 / 2, 4e-3 / 2 * 0.5),
        (4, 1.5e-3, 1.25e-4),
    ):
        made = planner(rows, exits=0.5)
        assert made.value(0) == pytest.approx(0.5 * first - READ, rel=1e-6)
        assert made.value(1) == pytest.approx(0.5 * later - READ, rel=1e-6)


def test_a_later_exit_of_eight_sequences_is_disabled_where_a_lone_one_evaluates_it():
    alone, eight = planner(1, exits=0.3), planner(8, exits=0.3)
    for made in (alone, eight):
        made.review()
    assert alone.is_enabled(0) and alone.is_enabled(1)
    assert eight.is_enabled(0) and not eight.is_enabled(1)


def test_what_stopping_a_pass_at_an_exit_takes_is_charged_by_the_row_and_interruptions_are_not():
    made = planner(2, exits=0.5)
    gain = made.value(1) + READ
    made.handled(1, 2, 0.4e-3)
    assert made.value(1) == pytest.approx(gain - 0.2e-3, rel=1e-6)
    made.handled(1, 2, 10.0)
    assert made.value(1) == pytest.approx(gain - 0.2e-3, rel=1e-6)
    made.handled(1, 1, 1.0e-3)
    assert made.value(1) == pytest.approx(gain - 0.3e-3, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_planner_of_a_batch_is_told_what_each_stop_of_a_deep_pass_took(rows):
    stops: list[tuple[int, int]] = []

    class Told(DraftPlanner):
        def handled(self, exit_index, rows, seconds):
            assert seconds >= 0
            stops.append((exit_index, rows))

    model = AdaptiveModel(tiny_model("llama", layers=6, dtype=torch.float32), [1, 2, 4])
    settings = LoopSettings(
        exits=(1, 2, 4),
        thresholds=(2.0,) * 3,
        fidelity=Fidelity.EXACT,
        max_pending=5,
        max_new_tokens=20,
    )
    made = Told(3, 5, [READ] * 3)
    loop = DecodeLoop(model.backbone, model.reader(), settings, planner=made)
    list(loop.run(torch.cat([random_ids(5, seed=seed) for seed in range(rows)])))
    deep = [count for k, count in loop.batch.reads if k > 0]
    assert [count for _, count in stops] == (deep if rows > 1 else [])
    assert deep
