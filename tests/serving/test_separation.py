"""Prompts and answers apart or together: every token comes once, and what waits for what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.serving.scale.separation import (
    Layout,
    Separation,
    StepTimes,
    Turn,
    arrivals,
    capacity,
    served,
)
from deliberate.utils.errors import DeliberateError

TIMES = StepTimes(
    decode=lambda n: 0.010 + 0.001 * n, prompt=lambda n: 0.001 * n, transfer=lambda n: 0.0001 * n
)


def run(layout: Layout, turns: list[Turn]) -> list[Turn]:
    Separation(TIMES, layout).run(turns)
    return turns


layouts = st.integers(1, 5).flatmap(
    lambda machines: st.builds(
        Layout,
        machines=st.just(machines),
        prefill=st.integers(0, machines - 1),
        slots=st.integers(1, 4),
        chunk=st.sampled_from([1, 7, 64]),
    )
)


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(0, 1000), st.floats(1, 200))
def test_every_request_gets_all_its_tokens_in_order_and_none_before_its_prompt(
    layout, seed, rate
) -> None:
    turns = run(layout, arrivals(rate, 25, (1, 90), (1, 12), seed))
    for turn in turns:
        assert len(turn.times) == turn.answer
        assert turn.first >= TIMES.prompt(turn.prompt) - 1e-9
        assert all(gap >= TIMES.decode(1) - 1e-9 for gap in turn.gaps)
    if layout.prefill:  # no prompt holds a decoding machine up
        longest = TIMES.decode(layout.slots) + 1e-9
        assert all(gap <= longest for turn in turns for gap in turn.gaps[1:])


def test_a_lone_request_takes_what_its_parts_take() -> None:
    (one,) = run(Layout(1), [Turn(2.0, 100, 3)])
    assert one.first == pytest.approx(0.1)
    assert one.gaps == pytest.approx([0.011, 0.011])
    (apart,) = run(Layout(2, prefill=1), [Turn(0.0, 100, 3)])
    assert apart.gaps == pytest.approx([0.01 + 0.011, 0.011])


def test_a_prompt_holds_up_those_that_decode_beside_it_by_a_chunk_at_a_time() -> None:
    for chunk, longest in ((256, 0.2 + 0.011), (20, 0.02 + 0.011)):
        first, second = Turn(0.0, 1, 40), Turn(0.05, 200, 1)
        run(Layout(1, chunk=chunk), [first, second])
        assert max(first.gaps) == pytest.approx(longest)
    first, second = Turn(0.0, 1, 40), Turn(0.05, 200, 1)
    run(Layout(2, prefill=1), [first, second])
    assert max(first.gaps[1:]) == pytest.approx(0.011)


def test_places_are_never_more_than_there_are() -> None:
    turns = run(Layout(1, slots=2), [Turn(0.0, 1, 10) for _ in range(4)])
    # Two by two: the third begins when the first two have ended.
    assert turns[2].times[0] > turns[0].times[-1]


def test_figures_count_both_limits() -> None:
    turns = [Turn(0.0, 1, 3, [0.1, 0.2, 0.3]), Turn(0.0, 1, 3, [0.1, 0.2, 0.9])]
    found = served(turns, 0.15, 0.2)
    assert found.in_time == 0.5 and found.rate == pytest.approx(2 / 0.9)
    assert found.first == (0.1, 0.1)
    assert capacity(TIMES, Layout(2, slots=10), (100, 100), (50, 50)) == pytest.approx(2 / 0.2)


@pytest.mark.parametrize("given", [{"prefill": 2}, {"machines": 0}, {"chunk": 0}])
def test_layouts_that_cannot_be_are_refused(given) -> None:
    with pytest.raises(DeliberateError, match=next(iter(given))):
        Layout(**{"machines": 2} | given)
