"""Tokens of several sequences in one call of the C++ kernels, each by its own noise and mask."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native import Layers
from deliberate.kernels.native_build import load
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns
from deliberate.kernels.native_spans import tables_of


@dataclass(frozen=True)
class ScoreRules:
    """What is done to scores before a token is chosen, after any of some tokens.

    Attributes:
        runs: ids of which the last must not follow the others.
        moves: one after another, a target and sources: the target gets what all of them have, the
            sources nothing. Target -1 is the next token of `tag`.
        tag: ids of which the newest tokens may have begun some; a token that completes it, or that
            is its next where a source of the first move had at least its score, is left to who
            calls.
        until: ids that are left to who calls.
        summed: a target gets the sum of the probabilities; else the highest of the scores.
    """

    runs: tuple[tuple[int, ...], ...] = ()
    moves: tuple[tuple[int, tuple[int, ...]], ...] = ()
    tag: tuple[int, ...] = ()
    until: tuple[int, ...] = ()
    summed: bool = False

    @property
    def recent(self) -> int:
        """Newest tokens that its runs depend on."""
        return max((len(run) for run in self.runs), default=1) - 1


@dataclass(frozen=True, eq=False)
class SampledRow:
    """One sequence of `sample_rows`.

    Attributes:
        row, runs: where its keys and values are, as in `Span`.
        token, start: what is fed first, and its position.
        steps: passes at most.
        rules: of its scores.
        until: ids that are left to who calls, beside those of the rules.
        recent: its newest tokens, oldest first, as many as its rules depend on or all.
        matched: tokens of the rules' tag that the newest ones have begun.
        noise: ``[steps, >= V]``, taken from the scores over `temperature`; None: greedy.
        left_out: one pass is run, and its token left to who calls.
    """

    row: int
    token: int
    start: int
    steps: int
    rules: ScoreRules
    until: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()
    matched: int = 0
    noise: Tensor | None = None
    temperature: float = 1.0
    left_out: bool = False
    runs: SequenceRuns | None = None


@dataclass(frozen=True, eq=False)
class Sampled:
    """What `sample_rows` made of one sequence.

    Attributes:
        tokens: that were accepted.
        logprobs: of each, by the logits.
        tops: the highest probability at each.
        passes: that were run: as many, or one more, whose token was left to who calls.
        logits: after the newest pass, ``[V]``.
    """

    tokens: list[int]
    logprobs: list[float]
    tops: list[float]
    passes: int
    logits: Tensor


class _Row(ctypes.Structure):
    """``SampledRow`` of sampling.cpp."""

    _fields_ = (
        ("row", c_int64),
        ("tables", c_void_p),
        *((name, c_int64) for name in ("token", "start", "steps", "stride")),
        ("noise", c_void_p),
        ("temperature", c_float),
        *((name, c_void_p) for name in ("runs", "moves", "tag", "recent", "until")),
        *((name, c_int64) for name in ("n_runs", "n_moves", "n_tag", "n_recent", "n_until")),
        *((name, c_int64) for name in ("summed", "matched", "left_out")),
        *((name, c_void_p) for name in ("tokens", "scores", "tops", "logits")),
        *((name, c_int64) for name in ("passes", "accepted")),
    )


class _Rules:
    """`ScoreRules` as the kernels take them, for a vocabulary."""

    def __init__(self, rules: ScoreRules, until: tuple[int, ...], vocabulary: int) -> None:
        moves = [(target, len(ids), *ids) for target, ids in rules.moves]
        self.tag = len(rules.tag)
        used = [i for run in rules.runs for i in run] + [*rules.tag, *rules.until, *until]
        used += [i for target, ids in rules.moves for i in (*ids, max(target, 0))]
        border.within(min(used, default=0), 0, vocabulary - 1, "a token of a mask")
        border.within(max(used, default=0), 0, vocabulary - 1, "a token of a mask")
        border.within(min((len(run) for run in rules.runs), default=1), 1, 1 << 30, "a run's size")
        if any(target < 0 for target, _ in rules.moves) and not rules.tag:
            raise border.BorderError("a mask moves scores to the next token of a tag without ids")
        self.recent = rules.recent
        self._kept = [
            _ids([i for run in rules.runs for i in (len(run), *run)]),
            _ids([i for move in moves for i in move]),
            _ids(rules.tag),
            _ids([*rules.until, *until]),
        ]
        self.addresses = [ctypes.addressof(one) for one in self._kept]
        self.counts = len(rules.runs), len(moves), len(rules.tag), len(rules.until) + len(until)


def _ids(values: Sequence[int]) -> Any:
    return (c_int64 * max(1, len(values)))(*values)


_rules = functools.lru_cache(maxsize=64)(_Rules)


@functools.cache
def _call() -> Any:
    library = load()
    library.deliberate_sampled_row_size.restype = c_int64
    border.same(
        ctypes.sizeof(_Row), int(library.deliberate_sampled_row_size()), "a row's structure"
    )
    call = library.deliberate_sample_rows
    call.restype = None
    call.argtypes = (
        *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64),
        *(c_void_p, c_void_p, c_void_p, c_int64),
    )
    return call


def sample_rows(
    layers: Layers,
    last: int,
    kv: KeysValues | PooledKeysValues,
    embedding: Tensor | BlockWeight,
    rows: Sequence[SampledRow],
    rotary: tuple[Tensor, Tensor],
    head: Head,
    threads: int,
) -> list[Sampled]:
    """Tokens of several sequences that share passes through layers 0..last-1.

    Args:
        kv: of all layers, with room for the steps of each row.
        embedding, rotary, head: as for `Layers.decode`.

    Raises:
        BorderError: an argument is not what the kernels read, or too short.
    """
    width, v = layers.width, head.vocabulary
    table, positions = layers.ready(last, kv, embedding, rotary, head, threads)
    border.same(head.tokens_end, v, "the end of the tokens that the head may choose")
    border.within(len(rows), 1, 1 << 20, "the number of sequences")
    where = [one.row if one.runs is None else id(one.runs) for one in rows]
    border.same(len(set(where)), len(rows), "the number of different sequences")
    longest = max(one.steps for one in rows)
    border.within(longest, 1, positions, "the number of steps")
    logits = torch.empty((len(rows), v), dtype=torch.float32, device="cpu")
    tokens = (c_int64 * (len(rows) * longest))()
    scores, tops = (c_float * (len(rows) * longest))(), (c_float * (len(rows) * longest))()
    arguments, kept = (_Row * len(rows))(), []
    for index, one in enumerate(rows):
        border.within(one.token, 0, table.n - 1, "the token that is fed")
        border.within(one.steps, 1, positions, "the number of steps")
        border.within(one.start, 0, positions - one.steps, "the first position")
        rules = _rules(one.rules, one.until, v)
        border.within(one.matched, 0, max(0, rules.tag - 1), "the begun tokens of a tag")
        if not one.temperature > 0.0:
            raise border.BorderError(f"temperature {one.temperature} must be above 0")
        noise, stride = None, 0
        if one.noise is not None:
            stride = one.noise.shape[-1]
            border.within(v, 1, stride, "the number of tokens with noise")
            border.within(one.steps, 1, border.states(one.noise, stride, "noise"), "steps")
            noise = one.noise.data_ptr()
        recent = _ids(one.recent[-rules.recent :] if rules.recent else ())
        kept.append((rules, recent))
        at = index * longest
        arguments[index] = _Row(
            one.row,
            tables_of(kv, (0, last), one.row, one.runs, one.start, one.start + one.steps),
            *(one.token, one.start, one.steps, stride, noise, one.temperature),
            *(*rules.addresses[:3], ctypes.addressof(recent), rules.addresses[3]),
            *(*rules.counts[:3], min(rules.recent, len(one.recent)), rules.counts[3]),
            *(one.rules.summed, one.matched, one.left_out),
            ctypes.addressof(tokens) + ctypes.sizeof(c_int64) * at,
            ctypes.addressof(scores) + ctypes.sizeof(c_float) * at,
            ctypes.addressof(tops) + ctypes.sizeof(c_float) * at,
            logits.data_ptr() + ctypes.sizeof(c_float) * index * v,
        )
    cos, sin = rotary
    _call()(
        layers.address,
        kv.arguments,
        last,
        ctypes.addressof(table),
        width,
        arguments,
        len(rows),
        cos.data_ptr(),
        sin.data_ptr(),
        ctypes.addressof(head.argument),
        threads,
    )
    made = []
    for index, done in enumerate(arguments):
        own = slice(index * longest, index * longest + done.accepted)
        made.append(Sampled(tokens[own], scores[own], tops[own], done.passes, logits[index]))
    return made
