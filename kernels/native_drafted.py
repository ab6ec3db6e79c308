"""Exact decoding with drafts by the C++ kernels: several passes of one sequence in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.draft_rules import CLASSES, ChainRule, LookupRule
from deliberate.kernels.native import Layers
from deliberate.kernels.native_build import load
from deliberate.kernels.native_draft_layer import DraftLayerCall
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns
from deliberate.kernels.native_spans import tables_of


@dataclass(frozen=True)
class LayerPart:
    """A draft layer, as it is before a call.

    Attributes:
        call: the layer.
        kv, row: where its entries are, of which there are `entries`.
        head: reads its outputs; the tokens that it chooses have an embedding.
        rotary: cos and sin of all positions.
        states: ``[n, d]``, of the tokens before the newest one that have no entries yet.
        rule: how far a chain of drafts goes.
    """

    call: DraftLayerCall
    kv: KeysValues
    head: Head
    rotary: tuple[Tensor, Tensor]
    row: int
    entries: int
    states: Tensor
    rule: ChainRule


@dataclass(frozen=True)
class ModelPart:
    """Layers of the shape of those that verify, which draft over the same keys and values.

    Attributes:
        layers: as many as the model has.
        ranges: which of them run: from each first to before each last one, rising.
        head: reads the state after them; the tokens that it chooses have an embedding.
        rule: how far a chain of drafts goes.

    Raises:
        BorderError: ranges that name no layers of these.
    """

    layers: Layers
    ranges: tuple[tuple[int, int], ...]
    head: Head
    rule: ChainRule

    def __post_init__(self) -> None:
        border.within(len(self.ranges), 1, len(self.layers), "the number of runs of layers")
        end = 0
        for first, last in self.ranges:
            border.within(first, end, len(self.layers) - 1, "the first layer of a run")
            border.within(last, first + 1, len(self.layers), "the last layer of a run")
            end = last

    def argument(self) -> tuple[Any, Any]:
        """As the kernels take it, and what must live as long."""
        flat = [layer for one in self.ranges for layer in one]
        ranges = (c_int64 * len(flat))(*flat)
        addresses = self.layers.address, ctypes.addressof(self.head.argument)
        made = _ModelArgument(*addresses, ctypes.addressof(ranges), len(self.ranges))
        made.rule = rule_argument(self.rule)
        return made, ranges


@dataclass(frozen=True)
class DraftedPass:
    """One pass of `DraftedDecoding.decode`.

    Attributes:
        drafted, looked_up, accepted: drafts, those of them that were looked up (all or none), and
            those that full depth accepted; one token more was chosen.
        confidences: of drafts of the layer, those that an end token cut off included.
        draft_seconds: of the layer's drafts after the first, each.
        drafting, verifying: seconds of this thread's processor time.
    """

    drafted: int
    looked_up: int
    accepted: int
    confidences: list[float]
    draft_seconds: list[float]
    drafting: float
    verifying: float


@dataclass(frozen=True)
class DraftedTokens:
    """What `DraftedDecoding.decode` did.

    Attributes:
        passes: one after another.
        tokens: that full depth chose.
        states: after the layers, of the newest token before and of all `tokens` but the last.
        entered: states of the call that the draft layer has entries of; 0 without a layer.
        declined, allowance: as in `LookupRule`, at the end.
    """

    passes: list[DraftedPass]
    tokens: list[int]
    states: Tensor
    entered: int
    declined: int = 0
    allowance: float = 0.0


class RuleArgument(ctypes.Structure):
    """``ChainRule`` of drafted.cpp."""

    _fields_ = (
        ("accepts", c_double * CLASSES),
        ("token_value", c_double),
        ("token_cost", c_double),
        ("draft_value", c_double),
        ("draft_cost", c_double),
        ("limit", c_int64),
    )


def rule_argument(rule: ChainRule) -> RuleArgument:
    """A rule as the kernels take it."""
    return RuleArgument(
        (c_double * CLASSES)(*rule.accepts),
        *(rule.token_value, rule.token_cost, rule.draft_value, rule.draft_cost),
        rule.limit,
    )


class _LayerArgument(ctypes.Structure):
    """``DraftLayer`` of drafted.cpp."""

    _fields_ = (
        ("joining", c_void_p),
        ("layer", c_void_p),
        ("kv", c_void_p),
        ("head", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("row", c_int64),
        ("entries", c_int64),
        ("states", c_void_p),
        ("tokens", c_void_p),
        ("waiting", c_int64),
        ("entered", c_int64),
        ("rule", RuleArgument),
    )


class _ModelArgument(ctypes.Structure):
    """``DraftModel`` of drafted.cpp."""

    _fields_ = (
        ("layers", c_void_p),
        ("head", c_void_p),
        ("ranges", c_void_p),
        ("n_ranges", c_int64),
        ("rule", RuleArgument),
    )


class _LookupArgument(ctypes.Structure):
    """``Lookup`` of drafted.cpp."""

    _fields_ = (
        ("best", c_void_p),
        ("most", c_int64),
        ("shortest", c_int64),
        ("longest", c_int64),
        ("every", c_int64),
        ("declined", c_int64),
        ("allowance", c_double),
        ("cost", c_double),
        ("earned", c_double),
        ("most_allowance", c_double),
    )


class _PassArgument(ctypes.Structure):
    """``DraftedPass`` of drafted.cpp."""

    _fields_ = (
        ("drafted", c_int64),
        ("looked_up", c_int64),
        ("accepted", c_int64),
        ("chained", c_int64),
        ("timed", c_int64),
        ("drafting", c_double),
        ("verifying", c_double),
    )


class DraftedCall:
    """One call of `DraftedDecoding.decode`: what the kernels get of it beside the model.

    Args:
        width: of states.
        text: all tokens of the sequence so far, of which no layer has run the newest.
        passes, room, left: most passes, positions that the cache has room for, and most tokens.
        stops: tokens that end it.
        layer, model, lookup: where drafts come from; at least one, and not the first two together.

    Attributes:
        arguments: from `text` to `left`, and from `stops` to `seconds`, as the kernels take them.

    Raises:
        BorderError: something that the kernels cannot run.
    """

    def __init__(
        self,
        width: int,
        text: Sequence[int],
        *,
        passes: int,
        room: int,
        left: int,
        stops: Collection[int],
        layer: LayerPart | None,
        lookup: LookupRule | None,
        model: ModelPart | None = None,
    ) -> None:
        if layer is None and lookup is None and model is None:
            raise border.BorderError("drafts come from no layer, no model and no lookup")
        if layer is not None and model is not None:
            raise border.BorderError("drafts come from a layer and a model: give one of the two")
        self._length, self._passes = len(text), passes
        self._widest = widest = max(
            0 if layer is None else layer.rule.limit,
            0 if model is None else model.rule.limit,
            0 if lookup is None else lookup.most,
        )
        border.within(passes, 1, 1 << 20, "the number of passes")
        border.within(left, 1, 1 << 40, "the number of tokens that are decoded")
        border.within(room, 1 + widest, 1 << 30, "the positions that there is room for")
        self._text = (c_int64 * (len(text) + room))(*text)
        self._lookup, self._best = None, None
        if lookup is not None:
            self._best = (c_int64 * (lookup.most + 1))(0, *lookup.best)
            self._lookup = _LookupArgument(
                ctypes.addressof(self._best),
                *(lookup.most, lookup.shortest, lookup.longest, lookup.every, lookup.declined),
                *(lookup.allowance, lookup.cost, lookup.earned, lookup.most_allowance),
            )
        self._layer = None if layer is None else self._layer_argument(layer, width, text, room)
        self._model = None if model is None else model.argument()
        self._made = (_PassArgument * passes)()
        self._confidences = (c_float * (passes * widest))()
        self._seconds = (c_double * (passes * widest))()
        self._states = torch.empty((room, width), dtype=torch.float32, device="cpu")
        self._stops = (c_int64 * len(stops))(*stops)
        self.before = (self._text, len(text))
        self.after = (
            *(passes, room, left, self._stops, len(stops)),
            None if self._layer is None else ctypes.addressof(self._layer),
            None if self._model is None else ctypes.addressof(self._model[0]),
            None if self._lookup is None else ctypes.addressof(self._lookup),
            *(widest, self._states.data_ptr(), self._made, self._confidences, self._seconds),
        )

    def _layer_argument(
        self, layer: LayerPart, width: int, text: Sequence[int], room: int
    ) -> _LayerArgument:
        """The layer as the kernels take it; its entries and those of the call have room."""
        n, call = border.states(layer.states, width, "states"), layer.call
        border.within(n, 1, len(text) - 1, "the number of states without entries")
        end = layer.entries + n + room
        address = call.ready(layer.kv, layer.head, layer.rotary, layer.row, layer.entries, end)
        # The tokens after these states: the newest is after the last of them.
        self._tokens = (c_int64 * n)(*text[-n:])
        border.within(min(self._tokens), 0, call.tokens - 1, "the least token")
        border.within(max(self._tokens), 0, call.tokens - 1, "the largest token")
        return _LayerArgument(
            *(call.address, address, ctypes.addressof(layer.kv.arguments)),
            ctypes.addressof(layer.head.argument),
            *(layer.rotary[0].data_ptr(), layer.rotary[1].data_ptr(), layer.row, layer.entries),
            *(layer.states.data_ptr(), ctypes.addressof(self._tokens), n, 0),
            rule_argument(layer.rule),
        )

    def made(self, passes: int) -> DraftedTokens:
        """What the kernels made in so many passes."""
        found = []
        for index, one in enumerate(self._made[:passes]):
            at = index * self._widest
            found.append(
                DraftedPass(
                    *(one.drafted, one.looked_up, one.accepted),
                    self._confidences[at : at + one.chained],
                    self._seconds[at : at + one.timed],
                    *(one.drafting, one.verifying),
                )
            )
        tokens = sum(one.accepted + 1 for one in found)
        return DraftedTokens(
            found,
            self._text[self._length : self._length + tokens],
            self._states[:tokens],
            0 if self._layer is None else self._layer.entered,
            0 if self._lookup is None else self._lookup.declined,
            0.0 if self._lookup is None else self._lookup.allowance,
        )


class DraftedDecoding:
    """Decoding with drafts through all layers of one model.

    Raises:
        BorderError: the kernels' structures are not those here.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        library = load()
        sizes = (c_int64 * 4)()
        library.deliberate_drafted_sizes.restype = None
        library.deliberate_drafted_sizes.argtypes = (c_void_p,)
        library.deliberate_drafted_sizes(sizes)
        for ours, theirs in zip(
            (_LayerArgument, _ModelArgument, _LookupArgument, _PassArgument), sizes, strict=True
        ):
            border.same(ctypes.sizeof(ours), theirs, "the size of a structure")
        self._call = library.deliberate_decode_drafted
        self._call.restype = c_int64
        self._call.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
            *(c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
        )

    def decode(
        self,
        kv: KeysValues | PooledKeysValues,
        embedding: Tensor | BlockWeight,
        text: Sequence[int],
        rotary: tuple[Tensor, Tensor],
        head: Head,
        *,
        room: int,
        left: int,
        threads: int,
        row: int = 0,
        runs: SequenceRuns | None = None,
        model: ModelPart | None = None,
        **how: Any,
    ) -> DraftedTokens:
        """Decodes greedily; see `deliberate_decode_drafted`.

        Args:
            text: all tokens so far, of which no layer has run the newest.
            embedding, rotary, head, row, runs: as for `Layers.decode`.
            room, left: positions from the newest token's on, and tokens at most: the cache has room
                for the smaller number, since no pass goes on after the last token.
            model, **how: as for `DraftedCall`.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        layers, start = self._layers, len(text) - 1
        last = len(layers)
        table, positions = layers.ready(last, kv, embedding, rotary, head, threads)
        border.within(start, 0, positions - room, "the first position")
        border.within(text[-1], 0, table.n - 1, "the token that is fed")
        tables = tables_of(kv, (0, last), row, runs, start, start + min(room, left))
        if model is not None:
            border.same(len(model.layers), last, "the number of layers that draft")
            model.layers.ready(last, kv, embedding, rotary, model.head, threads)
            border.within(model.head.tokens_end, 1, table.n, "the tokens that may be drafted")
        call = DraftedCall(layers.width, text, room=room, left=left, model=model, **how)
        passes = self._call(
            *(layers.address, kv.arguments, last, ctypes.addressof(table)),
            *(ctypes.addressof(head.argument), layers.width, row, tables, *call.before),
            *(rotary[0].data_ptr(), rotary[1].data_ptr(), *call.after, threads),
        )
        return call.made(passes)
