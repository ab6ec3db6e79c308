"""Drafts by a draft layer, with keys and values of its own, and by looking them up.

The layer holds one entry for every verified token whose state is known: the state of a position and
the token after it. Entries of drafts are its own outputs; they are dropped before the next draft,
whether the drafts were accepted or not, and those of accepted tokens are written anew from the
model's states.

States that are not known, of a prompt's beginning that other requests had computed, are done
without: entries begin where states do. So are those far back where many have no entries yet. The
layer's drafts depend little on what lies far back (docs/decoding.md has figures), and full depth
verifies them.

Sequences that share passes share the calls of the layer, too (`propose_together`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deliberate.engine.draft_chain import Chain
from deliberate.engine.draft_lengths import DraftLengths
from deliberate.engine.draft_plan import DraftPlan, call_passes
from deliberate.engine.ngram_drafts import CALL_PASSES, DraftSource, NgramDrafts
from deliberate.kernels.draft_rules import ChainRule, LookupRule
from deliberate.kernels.native_drafted import DraftedTokens

# Entries that are written at once at most: of more states the newest.
CONTEXT = 32
# States without entries beyond these are dropped when there are twice as many.
_KEPT = CONTEXT + 32


class DraftRunner(Protocol):
    """What runs a draft layer, see `deliberate.executors.draft_executor.DraftExecutor`."""

    def new_cache(self) -> Any:
        """Keys and values without entries, with `length`, `crop` and `close`."""

    def extend_rows(
        self, caches: Sequence[Any], states: Tensor, tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        """Appends entries of several sequences; their outputs ``[n, d]``."""

    def read_rows(self, outputs: Tensor) -> list[tuple[int, float]]:
        """Token and confidence after each output ``[R, d]``."""

    def part(
        self, cache: Any, states: Tensor, tokens: Sequence[int], rule: ChainRule, room: int
    ) -> Any:
        """What drafts inside a call that decodes, after these states and tokens, with room for so
        many entries more; None where it cannot."""


class LayerDrafts:
    """Proposes drafts for one sequence.

    Args:
        runner: runs the layer.
        lengths: the model's estimates of what drafts are worth; shared between generations.
        rows: where the layer's keys and values of sequences lie that share calls, with `open`; None
            for a place of this sequence's own.
        lookup: n-gram drafts, taken where the layer's first draft agrees; None for none.
        fixed: draft so many each time, whatever it is worth (for tests and measurements).
        clock: seconds, monotonic.
    """

    judges_load = True

    def __init__(
        self,
        runner: DraftRunner,
        lengths: DraftLengths,
        *,
        rows: Any = None,
        lookup: NgramDrafts | None = None,
        fixed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner = runner
        self.clock = clock
        self.shared = runner if rows is None else rows
        self._open = runner.new_cache if rows is None else rows.open
        self._all_lengths = lengths
        self._lengths = lengths
        self._lookup = lookup
        self._fixed = fixed
        self._cache: Any = None
        self._first = 0  # position of the first entry: later than 0 where a prefix was cached
        self._waiting: list[Tensor] = []  # states of positions after the last entry
        self._waited = 0
        self._confidences: list[float] = []
        self._looked_up = 0
        self._seconds = 0.0  # of the latest drafts
        self._on = False  # the layer was to draft for the next pass
        self.on_load(1)

    @property
    def most(self) -> int:
        """Drafts of a pass at most."""
        layer = self._all_lengths.most if self._fixed is None else self._fixed
        return max(layer, 0 if self._lookup is None else self._lookup.most)

    @property
    def cache(self) -> Any:
        """Keys and values of the layer, opened when they are first asked for."""
        if self._cache is None:
            self._cache = self._open()
        return self._cache

    @property
    def entries(self) -> int:
        """Entries that the layer holds."""
        return 0 if self._cache is None else int(self._cache.length)

    def on_load(self, rows: int) -> None:
        """So many sequences share passes from now on."""
        self._lengths = self._all_lengths.of_load(rows)
        if self._lookup is not None:
            self._lookup.switch = self._lengths.lookup_switch

    def expect_token(self, share: float) -> None:
        """Until measured, one more token in a pass takes this share of the sequence's part."""
        self._lengths.expect_token(share)
        if self._lookup is not None:
            self._lookup.expect_token(share)

    def forget(self) -> None:
        """The sequence has lost its keys and values, and with them what its states gave."""
        if self._cache is not None:
            self._cache.close()
        self._cache, self._first = None, 0
        self._waiting, self._waited = [], 0

    def rewind(self, count: int) -> None:
        """What comes after the first `count` tokens is read anew; `saw` drops their entries."""
        if self._lookup is not None:
            self._lookup.rewind(count)

    def saw(self, position: int, states: Tensor) -> None:
        """The model computed states ``[n, d]`` of positions `position`.. at full depth.

        Those of rejected drafts may be among them; the next call begins before them then.
        """
        known = self._first + self.entries + self._waited
        if not self._first <= position <= known or known == self._first:
            self._start_at(position)  # states between were not seen
        keep = position - self._first - self.entries
        if keep < 0:  # a position is run again: its entry follows the newer state
            self.cache.crop(position - self._first)
            self._waiting, self._waited = [], 0
        while self._waited > keep >= 0:
            piece = self._waiting.pop()
            self._waited -= len(piece)
            if self._waited < keep:
                self._waiting.append(piece[: keep - self._waited])
                self._waited = keep
        self._waiting.append(states)
        self._waited += len(states)
        if self._waited > 2 * _KEPT:
            newest = torch.cat(self._waiting)[-_KEPT:].clone()
            self._start_at(self._first + self.entries + self._waited - _KEPT)
            self._waiting, self._waited = [newest], _KEPT

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Drafts after these tokens.

        Args:
            ids: prompt and accepted tokens.
            most: further limit, e.g. of the output's length.
        """
        return propose_together([(self, ids, most)])[0]

    @property
    def plain_passes(self) -> int:
        """Several where the layer's drafts are off, and so are those that are looked up."""
        switch, most = self._lengths.switch, CALL_PASSES
        if self._lookup is not None and not switch.probing:
            most = self._lookup.plain_passes
        return 1 if self._on else min(1 + switch.off_passes, most)

    def note_single(self, seconds: float, passes: int = 1) -> None:
        """A pass, or each of so many in one call, over the newest token alone took so long."""
        self._lengths.note_single(seconds)
        if self._lookup is not None and not self._on:
            self._lookup.note_single(seconds, passes)
        self._note(seconds * passes, passes)

    def note_drafts(self, count: int, accepted: int, seconds: float) -> None:
        """A pass over the newest token and `count` drafts took so long; so many were accepted."""
        if self._lookup is not None and self._looked_up:
            noted = self._lookup.learn if self._on else self._lookup.note_drafts
            noted(count, accepted, seconds)
        else:
            self._lengths.note_pass(self._confidences[:count], accepted, seconds)
        self._note(seconds, accepted + 1)

    def _note(self, seconds: float, tokens: int) -> None:
        """What a pass took with its drafts."""
        switch = self._lengths.switch
        if not self._on:
            switch.skip(tokens - 1)
        if self._on or self._lookup is None:  # else the lookup has told its own
            switch.note(seconds + self._seconds, tokens, drafting=self._on)
        self._lengths.note_time(seconds + self._seconds, tokens)
        self._seconds, self._on = 0.0, False

    def begin(self, ids: Sequence[int], most: int) -> Chain | list[int]:
        """What the layer is to draft from; without it, what is looked up."""
        began = self.clock()
        self._confidences, self._looked_up, self._seconds = [], 0, 0.0
        switch = self._lengths.switch
        self._on = self._fixed is not None or switch.on()
        found: list[int] = []
        if self._lookup is not None:
            self._lookup.drafting = False
            if self._on:  # beside the layer's drafts always, else where it pays
                found = self._lookup.find(ids, most)
            elif not switch.probing:
                found = self._lookup.propose(ids, most)
        if most > 0 and (self._fixed is not None or (self._on and self._lengths.begin())):
            fed = self._catch_up(ids)
            if fed is not None:
                return Chain(self, *fed, self._rule(most), found)
        self._looked_up = len(found)
        self._seconds = self.clock() - began
        return found

    def plan(self, ids: Sequence[int], room: int) -> DraftPlan | None:
        """As `DraftSource.plan`: while the layer drafts and a draft is worth making."""
        count = len(ids) - 1 - self._first - self.entries
        if not self.drafts_now or not 0 < count <= min(self._waited, CONTEXT):
            return None
        states = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        states = states[:count]  # behind are those of rejected drafts
        self._waiting, self._waited = [states], count
        part = self.runner.part(self.cache, states, ids[-count:], self._rule(), room)
        if part is None:
            return None
        return DraftPlan(part, self._looked_up_rule(), call_passes(self._lengths.single))

    @property
    def drafts_now(self) -> bool:
        """Whether the next pass is to have a draft, as far as is known before its confidence."""
        lengths = self._lengths
        return self._fixed is not None or (lengths.pays and not lengths.switch.off_passes)

    def _looked_up_rule(self) -> LookupRule | None:
        """Of a call that drafts: how many looked-up tokens stand in for its drafts."""
        return None if self._lookup is None else self._lookup.rule(free=True)

    def note_passes(self, made: DraftedTokens, position: int, unit: float) -> None:
        """As `DraftSource.note_passes`."""
        self.cache.length += self._waited + made.entered
        self._waiting, self._waited = [], 0
        self.saw(position + made.entered, made.states[made.entered :])
        self._learn(made, unit)

    def _learn(self, made: DraftedTokens, unit: float) -> None:
        """What the passes of a call show of times and acceptance."""
        for one in made.passes:
            self._on, self._seconds = True, unit * one.drafting
            self._confidences, self._looked_up = one.confidences, one.looked_up
            for seconds in one.draft_seconds:
                self.note_draft(unit * seconds)
            if one.drafted:
                self.note_drafts(one.drafted, one.accepted, unit * one.verifying)
            else:
                self.note_single(unit * one.verifying)
        if self._lookup is not None:
            self._lookup.declined = made.declined

    def _rule(self, most: int | None = None) -> ChainRule:
        fixed = self._fixed is not None
        limit = self._lengths.most if self._fixed is None else self._fixed
        return self._lengths.rule(limit if most is None else min(most, limit), always=fixed)

    def end(self, chain: Chain, seconds: float) -> list[int]:
        """The drafts of a chain, which took so long; drops its entries."""
        self._confidences, self._looked_up = chain.confidences, chain.looked_up
        self._seconds = seconds
        self.cache.crop(chain.verified)
        return chain.drafts

    def note_draft(self, seconds: float) -> None:
        """One draft after the first took so long."""
        self._lengths.note_draft(seconds)

    def _catch_up(self, ids: Sequence[int]) -> tuple[Tensor, list[int]] | None:
        """States of verified tokens that the layer has no entries of, and the tokens after them."""
        count = min(self._waited, len(ids) - 1 - self._first - self.entries)
        if count <= 0:
            return None
        states = torch.cat(self._waiting)[:count] if len(self._waiting) > 1 else self._waiting[0]
        states = states[max(0, count - CONTEXT) : count]
        if count > CONTEXT:
            self._start_at(self._first + self.entries + count - CONTEXT)
        self._waiting, self._waited = [], 0
        begin = self._first + self.entries + 1
        return states, list(ids[begin : begin + len(states)])

    def _start_at(self, position: int) -> None:
        """Entries begin at this position."""
        if self._cache is not None:
            self._cache.crop(0)
        self._waiting, self._waited, self._first = [], 0, position


def propose_together(asked: Sequence[tuple[DraftSource, Sequence[int], int]]) -> list[list[int]]:
    """Drafts of several sequences: those by one layer in the same calls of it.

    Args:
        asked: what proposes, and the arguments of its `propose`.
    """
    made: list[list[int]] = []
    chains: dict[tuple[int, int], list[tuple[int, Chain]]] = {}
    for place, (source, ids, most) in enumerate(asked):
        begun = source.begin(ids, most) if isinstance(source, LayerDrafts) else None
        if begun is None:
            begun = source.propose(ids, most)
        if isinstance(begun, Chain):
            key = id(begun.source.runner), id(begun.source.shared)
            # Sequences without a common place of keys and values cannot share a call.
            key = (id(begun), 0) if begun.source.shared is begun.source.runner else key
            chains.setdefault(key, []).append((place, begun))
        made.append([] if isinstance(begun, Chain) else begun)
    for group in chains.values():
        own = [chain for _, chain in group]
        seconds = _draft(own) / len(own)
        for place, chain in group:
            made[place] = chain.source.end(chain, seconds)
    return made


def _draft(chains: Sequence[Chain]) -> float:
    """Makes the drafts of these; the seconds of all."""
    runner, clock = chains[0].source.runner, chains[0].source.clock
    began = clock()
    going = list(chains)
    states = [chain.states for chain in going]
    outputs = runner.extend_rows(
        [chain.source.cache for chain in going],
        states[0] if len(states) == 1 else torch.cat(states),
        [chain.tokens for chain in going],
    )
    ends = [end - 1 for end in itertools.accumulate(len(chain.tokens) for chain in going)]
    outputs = outputs[-1:] if len(ends) == 1 else outputs[ends]
    drafting: float | None = None  # when the last entries were begun, the verified ones not
    while True:
        read = runner.read_rows(outputs)
        if drafting is not None:
            each = (clock() - drafting) / len(going)
            for chain in going:
                chain.source.note_draft(each)
        more = [
            place
            for place, (chain, (token, confidence)) in enumerate(zip(going, read, strict=True))
            if chain.continues(token, confidence)
        ]
        if not more:
            return clock() - began
        drafting = clock()
        outputs = outputs if len(more) == len(going) else outputs[more]
        going = [going[place] for place in more]
        outputs = runner.extend_rows(
            [chain.source.cache for chain in going],
            outputs,
            [chain.drafts[-1:] for chain in going],
        )
