"""Several tokens in one call of the C++ kernels: what they are given, and what they made."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.native_arguments import DraftRowArgument
from deliberate.kernels.native_inputs import KeysValues
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns
from deliberate.kernels.native_spans import tables_of


@dataclass(frozen=True)
class Decoded:
    """What `Layers.decode` did.

    Attributes:
        states: after the layers, ``[passes, d]``.
        tokens, scores: chosen after each pass that ran the head.
        accepted: number of tokens that are accepted: all of them, or all but the last.
    """

    states: Tensor
    tokens: list[int]
    scores: list[float]
    accepted: int


@dataclass(frozen=True)
class DraftRow:
    """One sequence of `Layers.draft_rows`.

    Attributes:
        row, runs: where its keys and values are, as in `Span`.
        token, start: what is fed first, and its position.
        steps: passes at most.
        requested: of these, the first ones after which the head is read.
        threshold: least score of a token that is accepted.
        stops: tokens that are never accepted.
    """

    row: int
    token: int
    start: int
    steps: int
    requested: int
    threshold: float
    stops: Sequence[int]
    runs: SequenceRuns | None = None


@dataclass(frozen=True)
class DraftedRows:
    """What `Layers.draft_rows` did.

    Attributes:
        rows: of each sequence.
        seconds: processor time of each pass, the head not included.
        states: of all rows, ``[R, most passes, d]``; what lies after a row's passes is undefined.
    """

    rows: list[Decoded]
    seconds: list[float]
    states: Tensor


class PackedRows:
    """The sequences of one call of `Layers.draft_rows`, as the kernels take them.

    Args:
        rows: at least one, no two of them the same.
        width: of states.
        limits: tokens that have an embedding, and positions that have rotary tables.
        kv, last: the layers below `last` have room for the steps of each.

    Attributes:
        arguments: one of each.
        seconds: room for the time of each pass.

    Raises:
        BorderError: a sequence that the kernels cannot run.
    """

    def __init__(
        self,
        rows: Sequence[DraftRow],
        width: int,
        limits: tuple[int, int],
        kv: KeysValues | PooledKeysValues,
        last: int,
    ) -> None:
        vocabulary, positions = limits
        border.within(len(rows), 1, 1 << 20, "the number of sequences")
        places = [one.row if one.runs is None else id(one.runs) for one in rows]
        border.same(len(set(places)), len(rows), "the number of different sequences")
        self._rows = rows
        self._longest = longest = max(one.steps for one in rows)
        border.within(longest, 1, positions, "the number of steps")
        self._states = torch.empty((len(rows), longest, width), dtype=torch.float32, device="cpu")
        self._tokens = (c_int64 * (len(rows) * longest))()
        self._scores = (c_float * (len(rows) * longest))()
        self._stops = [(c_int64 * len(one.stops))(*one.stops) for one in rows]
        self.seconds = (c_double * longest)()
        self.arguments = (DraftRowArgument * len(rows))()
        for index, one in enumerate(rows):
            border.within(one.token, 0, vocabulary - 1, "the token that is fed")
            border.within(one.steps, 1, positions, "the number of steps")
            border.within(one.start, 0, positions - one.steps, "the first position")
            border.within(one.requested, 0, one.steps, "the number of steps that ask")
            at = index * longest
            self.arguments[index] = DraftRowArgument(
                one.row,
                tables_of(kv, (0, last), one.row, one.runs, one.start, one.start + one.steps),
                *(one.token, one.start, one.steps, one.requested, one.threshold),
                *(ctypes.addressof(self._stops[index]), len(one.stops)),
                self._states.data_ptr() + ctypes.sizeof(c_float) * at * width,
                ctypes.addressof(self._tokens) + ctypes.sizeof(c_int64) * at,
                ctypes.addressof(self._scores) + ctypes.sizeof(c_float) * at,
            )

    def drafted(self, passes: int) -> DraftedRows:
        """What the kernels made of them in so many passes."""
        made = []
        for index, (one, done) in enumerate(zip(self._rows, self.arguments, strict=True)):
            at = index * self._longest
            own = slice(at, at + min(done.passes, one.requested))
            states = self._states[index, : done.passes]
            made.append(Decoded(states, self._tokens[own], self._scores[own], done.standing))
        return DraftedRows(made, self.seconds[:passes], self._states)
