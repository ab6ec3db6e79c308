"""Rows of one call of drafts: nothing that the C++ kernels cannot run gets past the border."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deliberate.kernels.border import BorderError
from deliberate.kernels.native_drafts import DraftRow, PackedRows
from deliberate.kernels.native_inputs import KeysValues

WIDTH, VOCABULARY, POSITIONS, CAPACITY = 6, 11, 9, 8
ROW = DraftRow(1, token=3, start=2, steps=4, requested=3, threshold=0.5, stops=(7,))


def packed(*rows: DraftRow) -> PackedRows:
    kv = KeysValues([(torch.zeros(2, 1, CAPACITY, 4), torch.zeros(2, 1, CAPACITY, 4))])
    return PackedRows(rows, WIDTH, (VOCABULARY, POSITIONS), kv, 1)


def test_rows_that_can_be_run_are_taken():
    other = dataclasses.replace(ROW, row=0, start=6, steps=2, requested=0, stops=())
    made = packed(ROW, other)
    assert [one.start for one in made.arguments] == [2, 6]
    assert made.drafted(0).states.shape == (2, 4, WIDTH)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"token": VOCABULARY}, "the token that is fed is 11"),
        ({"token": -1}, "the token that is fed is -1"),
        ({"steps": 0, "requested": 0}, "the number of steps is 0"),
        ({"start": 6}, "the first position is 6"),
        ({"start": 5}, "tokens up to position 8 of row 1"),
        ({"row": 2}, "of row 2: the cache has 2 rows"),
        ({"requested": 5}, "the number of steps that ask is 5"),
    ],
)
def test_a_row_that_cannot_be_run_is_refused_by_name(wrong, said):
    with pytest.raises(BorderError, match=said):
        packed(dataclasses.replace(ROW, **wrong))


def test_one_sequence_is_not_drafted_for_twice():
    with pytest.raises(BorderError, match="the number of different sequences is 1"):
        packed(ROW, ROW)
