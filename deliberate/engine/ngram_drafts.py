"""Drafts that cost nothing: what followed when the newest tokens were last seen in this text.

Prompt lookup decoding (Saxena, 2023; LLMA, arXiv:2304.04487): the last n tokens are looked up in
the prompt and the output so far; the tokens that followed them there are drafts, verified in one
full-depth pass with the newest token. How many are worth verifying is decided online: a pass over
more tokens takes longer, and each further draft is accepted more rarely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from deliberate.engine.draft_plan import DraftPlan, call_passes
from deliberate.engine.draft_switch import DraftSwitch
from deliberate.kernels.draft_rules import LookupRule, affordable
from deliberate.kernels.native_drafted import DraftedTokens

# A match of the longest of these lengths is taken.
LONGEST, SHORTEST = 4, 2
# Drafts of one pass, where the caller does not say.
DEFAULT_TOKENS = 6
# Passes that the first estimates weigh as much as.
_PRIOR_PASSES = 4.0
# First estimates: share of accepted drafts among those after accepted ones, and what one more token
# adds to the time of a pass, as a share of it.
_PRIOR_ACCEPTED, _PRIOR_SLOPE = 0.5, 0.1
# Passes over one token that drafts may lose at first, what each token allows them to lose beside,
# and what is kept of gains: of 64 tokens they lose 1.7 at most, or 2.7 %, whatever the text.
_ALLOWANCE, _EARNED, _MOST_ALLOWANCE = 0.75, 0.015, 4.0
# Weight of the newest time.
_NEWEST = 0.25
# After so many matches that were not worth it, one is tried with a single draft.
_TRY_AGAIN = 16
# Passes without drafts in one call of the executor.
CALL_PASSES = 8
# A pass below this is cheap beside the Python around it.
CHEAP_SECONDS = 0.003


class DraftSource(Protocol):
    """Where the drafts of one sequence come from, beside exits.

    Attributes:
        judges_load: it knows what its drafts are worth at each load; else whoever asks for them
            beside other sequences judges that.
    """

    judges_load: bool

    @property
    def most(self) -> int:
        """Drafts of a pass at most."""

    def on_load(self, rows: int) -> None:
        """So many sequences share passes from now on."""

    def expect_token(self, share: float) -> None:
        """One more token in a pass is expected to take this share of the sequence's part of it,
        until it is measured."""

    def forget(self) -> None:
        """The sequence has lost its keys and values, and with them what its states gave."""

    def rewind(self, count: int) -> None:
        """The text goes on from its first `count` tokens in another way than it did."""

    @property
    def plain_passes(self) -> int:
        """Passes that may be run without asking for drafts in between, in one call of the executor;
        where none was proposed."""

    def saw(self, position: int, states: Tensor) -> None:
        """Full depth computed states ``[n, d]`` of positions `position`.., prompt included."""

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Drafts after these tokens, at most so many."""

    def note_single(self, seconds: float, passes: int = 1) -> None:
        """A pass, or each of so many in one call, over the newest token alone took so long."""

    def note_drafts(self, count: int, accepted: int, seconds: float) -> None:
        """A pass over the newest token and `count` drafts took so long; so many were accepted."""

    def plan(self, ids: Sequence[int], room: int) -> DraftPlan | None:
        """Where drafts of several passes in one call come from; None: ask before each pass.

        Args:
            ids: prompt and accepted tokens.
            room: positions that the call may write.
        """

    def note_passes(self, made: DraftedTokens, position: int, unit: float) -> None:
        """What the passes did that `plan` was asked for.

        Args:
            position: of the newest token before them.
            unit: seconds of the clock for each that they measured.
        """


def same_source(own: DraftSource, other: DraftSource) -> bool:
    """Whether two sources would draft the same."""
    runners = [getattr(one, "runner", None) for one in (own, other)]
    return type(own) is type(other) and own.most == other.most and runners[0] is runners[1]


class NgramDrafts:
    """Proposes drafts for one sequence, and learns what they are worth.

    Args:
        most: drafts of one pass, at least 1.

    Attributes:
        most: the same.
        switch: whether to draft at all, of all sequences of a model; None: always.
        drafting: it was on when drafts for the next pass were asked for.
        declined: matches that were not worth a draft.
        allowance: passes over one token that drafts may lose now.
    """

    judges_load = False

    def __init__(self, most: int) -> None:
        self.most = most
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        self._indexed = 0
        self._tried = [_PRIOR_PASSES] * most
        self._accepted = [_PRIOR_PASSES * _PRIOR_ACCEPTED] * most
        self._single: float | None = None  # seconds of a pass over the newest token alone
        self._slope = _PRIOR_SLOPE
        self._measured = False
        self.declined = 0
        self.allowance = _ALLOWANCE
        self.switch: DraftSwitch | None = None
        self.drafting = False

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Drafts after these tokens, none where nothing matches or nothing would be gained.

        Args:
            ids: prompt and accepted tokens; each call continues those of the call before.
            most: further limit, e.g. of the output's length.
        """
        self.drafting = self.switch is None or self.switch.on()
        if not self.drafting:
            return []
        found = self.find(ids, most)
        return found[: affordable(self.allowance, self._slope, len(found))]

    def find(self, ids: Sequence[int], most: int) -> list[int]:
        """As `propose`, whatever the switch and the allowance say."""
        found = self._match(ids)[: min(most, self.most)]
        if not found:
            return []
        count = self._best(len(found))
        if count == 0:
            self.declined += 1
            if self.declined % _TRY_AGAIN:
                return []
            count = 1
        return found[:count]

    @property
    def plain_passes(self) -> int:
        """Several where a pass over one token takes hardly longer than the bookkeeping around it,
        and where drafting is off."""
        cheap = self._single is not None and self._single < CHEAP_SECONDS
        off = 0 if self.switch is None else self.switch.off_passes
        return CALL_PASSES if cheap else 1 + min(CALL_PASSES - 1, off)

    def saw(self, position: int, states: Tensor) -> None:
        """Hidden states are of no use here."""

    def on_load(self, rows: int) -> None:
        """What is looked up does not depend on it."""

    def expect_token(self, share: float) -> None:
        """Until measured, one more token in a pass takes this share of the sequence's part."""
        if not self._measured:
            self._slope = share

    def forget(self) -> None:
        """The text stays what it was."""

    def rewind(self, count: int) -> None:
        """What comes after the first `count` tokens is read anew."""
        self._indexed = min(self._indexed, count)

    def note_single(self, seconds: float, passes: int = 1) -> None:
        """A pass, or each of so many in one call, over the newest token alone took so long."""
        self._single = _blend(self._single, seconds)
        self._earn(_EARNED * passes)
        self._note(seconds * passes, passes)

    def note_drafts(self, count: int, accepted: int, seconds: float) -> None:
        """A pass over the newest token and `count` drafts took so long; so many were accepted."""
        self._earn(_EARNED * (accepted + 1) + accepted - self._slope * count)
        self.learn(count, accepted, seconds)
        self._note(seconds, accepted + 1)

    def _earn(self, passes: float) -> None:
        self.allowance = min(_MOST_ALLOWANCE, self.allowance + passes)

    def _note(self, seconds: float, tokens: int) -> None:
        if self.switch is not None:
            self.switch.note(seconds, tokens, drafting=self.drafting)
            if not self.drafting:
                self.switch.skip(tokens - 1)
        self.drafting = False

    def learn(self, count: int, accepted: int, seconds: float) -> None:
        """As `note_drafts`, of drafts that somebody else had chosen, too."""
        for index in range(min(count, accepted + 1)):
            self._tried[index] += 1.0
            self._accepted[index] += index < accepted
        if self._single is not None and self._single > 0:
            extra = max(0.0, seconds / self._single - 1.0) / count
            self._slope = _blend(self._slope, extra)
            self._measured = True

    def plan(self, ids: Sequence[int], room: int) -> DraftPlan | None:
        """As `DraftSource.plan`: while it drafts."""
        if self.switch is not None and self.switch.off_passes:
            return None
        return DraftPlan(None, self.rule(), call_passes(self._single))

    def rule(self, *, free: bool = False) -> LookupRule:
        """How many of the tokens that match are drafts, by what is known now.

        Args:
            free: something else says whether they are verified, and they need no allowance.
        """
        best = tuple(self._best(count) for count in range(1, self.most + 1))
        rule = LookupRule(best, SHORTEST, LONGEST, _TRY_AGAIN, self.declined)
        if free:
            return rule
        return dataclasses.replace(
            rule,
            allowance=self.allowance,
            cost=self._slope,
            earned=_EARNED,
            most_allowance=_MOST_ALLOWANCE,
        )

    def note_passes(self, made: DraftedTokens, position: int, unit: float) -> None:
        """As `DraftSource.note_passes`."""
        for one in made.passes:
            self.drafting, seconds = True, unit * (one.drafting + one.verifying)
            if one.drafted:
                self.note_drafts(one.drafted, one.accepted, seconds)
            else:
                self.note_single(seconds)
        self.declined, self.allowance = made.declined, made.allowance

    def _match(self, ids: Sequence[int]) -> list[int]:
        """What followed the newest tokens when they were last seen."""
        for end in range(max(self._indexed, SHORTEST), len(ids)):
            for place, length in enumerate(range(SHORTEST, LONGEST + 1)):
                if end >= length:
                    self._after[place][tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids))
        for place, length in reversed(list(enumerate(range(SHORTEST, LONGEST + 1)))):
            if len(ids) > length:
                found = self._after[place].get(tuple(ids[-length:]))
                if found is not None:
                    return list(ids[found : found + self.most])
        return []

    def _best(self, most: int) -> int:
        """The number of drafts with the most tokens per second; 0 is a pass without drafts."""
        best, best_rate, tokens, survives = 0, 1.0, 1.0, 1.0
        for index in range(most):
            survives *= self._accepted[index] / self._tried[index]
            tokens += survives
            rate = tokens / (1.0 + self._slope * (index + 1))
            if rate > best_rate:
                best, best_rate = index + 1, rate
        return best


def _blend(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
