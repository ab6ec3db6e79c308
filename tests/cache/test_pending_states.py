"""Pending states against lists of states."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.cache.pending_states import PendingStates

BATCH, CAPACITY, WIDTH = 3, 6, 2
some_rows = st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=BATCH, unique=True).map(sorted)
actions = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "take", "clear"]),
        some_rows,
        st.lists(st.integers(1, 2), min_size=BATCH, max_size=BATCH),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(actions)
def test_rows_get_back_what_they_appended_in_order(steps) -> None:
    pending = PendingStates(BATCH, CAPACITY)
    held: list[list[torch.Tensor]] = [[] for _ in range(BATCH)]
    drawn = torch.Generator().manual_seed(0)
    for action, rows, wanted in steps:
        if action == "append":
            rows = [row for row in rows if len(held[row]) + max(wanted) <= CAPACITY]
            counts = wanted[: len(rows)]
            if not rows:
                continue
            hidden = torch.randn(len(rows), max(counts), WIDTH, generator=drawn)
            pending.append(rows, hidden, counts)
            for states, row, count in zip(hidden, rows, counts, strict=True):
                held[row] += list(states[:count])
        elif action == "take":
            rows = [row for row in rows if held[row]]
            if not rows:
                continue
            taken, counts = pending.take(rows)
            assert counts == [len(held[row]) for row in rows]
            assert taken.shape == (len(rows), max(counts), WIDTH)
            for states, row, count in zip(taken, rows, counts, strict=True):
                assert torch.equal(states[:count], torch.stack(held[row]))
                held[row] = []
        else:
            pending.clear(rows[0])
            held[rows[0]] = []
        assert [pending.count(row) for row in range(BATCH)] == [len(one) for one in held]
        assert pending.total() == sum(len(one) for one in held)


def test_rows_that_are_kept_keep_their_states() -> None:
    pending = PendingStates(3, 4)
    hidden = torch.arange(12.0).view(3, 2, 2)
    pending.append([0, 1, 2], hidden, [1, 2, 2])
    pending.keep([2, 0])
    assert [pending.count(row) for row in range(2)] == [2, 1]
    taken, counts = pending.take([0, 1])
    assert counts == [2, 1]
    assert torch.equal(taken[0], hidden[2]) and torch.equal(taken[1, :1], hidden[0, :1])
