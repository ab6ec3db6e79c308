"""A limit on the tokens of reasoning that no path of decoding can exceed.

It is a `LogitConstraint`: a function of the tokens so far, applied to drafts and to full depth
alike, and rolled back with rejected drafts. So it holds in every fidelity, in batches and streams.
When the budget is used up the closing tag is forced, and tokens are kept for the answer. No
character of several bytes is cut; a tool call ends the reasoning, so that it is not cut either.

The same constraint moves probability: from the closing tag to "Wait" where a chain is to go on (s1,
Muennighoff et al., 2025, arXiv:2501.19393), and away from switch words (NoWait, arXiv:2506.08343).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deliberate.engine.constraints import SteadyMask
from deliberate.reasoning.budget_state import FORBIDDEN, LONGEST_CHARACTER, Phase, State
from deliberate.reasoning.marks import Forms, ReasoningMarks, Utf8Ends
from deliberate.reasoning.steady_budget import move_probability, steady_mask
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class BudgetSettings:
    """The limits of one output.

    Attributes:
        max_new_tokens: of reasoning and answer together.
        reasoning: tokens between the tags at most (vLLM's ``thinking_token_budget``); None: as many
            as leave room for the answer. 0: none.
        answer: tokens kept for the answer, at least 1.
        extensions: how often the end of reasoning is put off by `extension`.
        extension: ids that take the place of the closing tag then.
        suppressed: runs of ids that reasoning must not hold.

    Raises:
        DeliberateError: a value that is not allowed, or extensions without ids.
    """

    max_new_tokens: int
    reasoning: int | None = None
    answer: int = 16
    extensions: int = 0
    extension: tuple[int, ...] = ()
    suppressed: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("answer", self.answer, 1)
        at_least("extensions", self.extensions, 0)
        if self.reasoning is not None:
            at_least("reasoning", self.reasoning, 0)
        object.__setattr__(self, "extension", tuple(self.extension))
        object.__setattr__(self, "suppressed", tuple(map(tuple, self.suppressed)))
        if self.extensions and not self.extension:
            raise DeliberateError(f"extensions={self.extensions} without extension: give its ids")
        if () in self.suppressed:
            raise DeliberateError("suppressed has an empty run: give token ids")


@dataclass
class ReasoningConstraint:
    """The budget along one output; a `LogitConstraint`.

    Args:
        settings: the limits.
        marks: around the reasoning.
        end_tokens: that end an output; they may come once the answer has a token.
        ends: which tokens begin a character and do not complete it; None: none do.
        blank: tokens that make no answer.
        start: tokens that the output has already, where a request continues it.
        greedy: its tokens are not sampled. Where probability is moved, the target then gets the
            highest of the scores, not their sum, so that what a greedy choice becomes depends on
            that choice alone (`changes`).

    Raises:
        DeliberateError: the limits leave no room for the tags and the answer.
    """

    settings: BudgetSettings
    marks: ReasoningMarks
    end_tokens: Collection[int] = ()
    ends: Utf8Ends | None = None
    blank: Collection[int] = ()
    start: Sequence[int] = ()
    greedy: bool = False
    _states: list[State] = field(default_factory=list, init=False)
    _tokens: list[int] = field(default_factory=list, init=False)
    _moved: dict[int, bool] = field(default_factory=dict, init=False)
    _ended: dict[int, bool] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings, marks = self.settings, self.marks
        least = marks.least(settings.answer)
        if settings.max_new_tokens < least:
            raise DeliberateError(
                f"max_new_tokens={settings.max_new_tokens} leaves no room: the tags and "
                f"answer={settings.answer} take {least} tokens"
            )
        self._ends = sorted(self.end_tokens)
        self._end_set = frozenset(self.end_tokens)
        self._blank = frozenset(self.blank)
        begin = Phase.BEFORE if marks.opening else Phase.REASONING
        self._states = [State(begin)]
        for token in self.start:
            self.advance(token)

    @property
    def finished(self) -> bool:
        """Never by itself: an end token ends the output."""
        return False

    @property
    def phase(self) -> Phase:
        """Where the output is."""
        return self._states[-1].phase

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far, tags not counted."""
        return self._states[-1].count

    @property
    def extended(self) -> int:
        """How often the end of reasoning was put off."""
        return self._states[-1].extended

    @property
    def within_character(self) -> bool:
        """Whether the newest token of the reasoning leaves a character of several bytes open."""
        return self._states[-1].phase is Phase.REASONING and self._states[-1].need > 0

    @property
    def called(self) -> bool:
        """Whether the newest token ended the reasoning by beginning a tool call."""
        call = self.marks.call
        before = self._states[-2:-1]
        if not call or not before or before[0].phase is not Phase.REASONING:
            return False
        return self.phase is Phase.ANSWER and tuple(self._tokens[-len(call) :]) == call

    @property
    def may_open(self) -> bool:
        """Whether there is room for the opening tag, as far as it is missing, and what follows."""
        marks, settings, state = self.marks, self.settings, self._states[-1]
        left = settings.max_new_tokens - len(self._tokens)
        needed = len(marks.opening) - state.matched + len(marks.handover) + settings.answer
        return settings.reasoning != 0 and left >= needed

    # -- runs of tokens that are chosen without it ------------------------------------------------

    def free(self) -> int:
        """Tokens before a limit is near, of which a greedy choice stands but where it `changes`."""
        state, limit = self._states[-1], self.settings.reasoning
        if self.forced() or not self.greedy:
            return 0
        left = self.settings.max_new_tokens - len(self._tokens)
        if state.phase is not Phase.ANSWER:
            left = self._room() - len(self.marks.opening)
            if limit is not None:
                left = min(left, limit - state.count)
        return max(0, left - LONGEST_CHARACTER)

    def changes(self, token: int) -> bool:
        """Whether the mask makes another token of this greedy choice; asked within `free`."""
        state, settings, marks = self._states[-1], self.settings, self.marks
        if token in self._end_set:
            return state.phase is Phase.REASONING or not state.answered
        if state.phase is Phase.ANSWER:
            again = marks.reopening or marks.opening
            return bool(again) and token == again[-1] and self._follows(again)
        if state.phase is Phase.BEFORE:
            opens = state.matched == len(marks.opening) - 1 and token in marks.opens[-1]
            return opens and not self.may_open
        if token == marks.closing[0] and self._puts_off(state):
            return True
        return any(token == run[-1] and self._follows(run) for run in settings.suppressed)

    # -- LogitConstraint -------------------------------------------------------------------------

    def forced(self) -> list[int]:
        """The rest of the handover or of an extension, where it must follow."""
        state = self._states[-1]
        if state.phase is not Phase.REASONING:
            return []
        if state.extending:
            return list(self.settings.extension[state.extending :])
        if state.closing or self._used_up(state):
            return list(self.marks.handover[state.matched :])
        return []

    def mask(self, scores: Tensor) -> Tensor:
        """Scores ``[V]`` in which what may not come next is minus infinity."""
        following = self.forced()
        if following:
            only = torch.full_like(scores, FORBIDDEN)
            only[following[0]] = 0.0
            return only
        scores = scores.clone()
        state = self._states[-1]
        if state.phase is Phase.ANSWER:
            self._mask_answer(scores, state)
            return scores
        if state.phase is Phase.BEFORE:
            self._mask_before(scores, state)
            return scores
        for run in self.settings.suppressed:
            if self._follows(run):
                scores[run[-1]] = FORBIDDEN
        self._close(scores, self.marks.closing[state.matched])
        self._keep_characters(scores, self._left(state))
        self._put_off(scores, state)
        return scores

    def steady(self) -> SteadyMask | None:
        """What it does to the tokens to come, while no limit is near (`SteadyMask`)."""
        if self.forced():
            return None
        state, settings = self._states[-1], self.settings
        made = self._tokens
        answering = state.phase is Phase.ANSWER
        left = settings.max_new_tokens - len(made) if answering else self._left(state)
        left -= LONGEST_CHARACTER - 1
        return steady_mask(settings, self.marks, self._ends, self.greedy, state, made, left)

    def passed(self, token: int, logprob: float) -> None:
        """As `advance`, of a token that was chosen as `steady` says."""
        for noted in (self._moved, self._ended):
            noted.pop(len(self._tokens), None)
        self.advance(token)

    def advance(self, token: int) -> None:
        """The output continues with this token.

        Raises:
            DeliberateError: another one is forced.
        """
        following = self.forced()
        if following and token != following[0]:
            raise DeliberateError(f"token {token} where {following[0]} must follow")
        state = self._states[-1]
        self._tokens.append(token)
        if state.phase is Phase.ANSWER:
            answered = state.answered or (token not in self._blank and token not in self._ends)
            self._states.append(replace(state, answered=answered))
        elif state.phase is Phase.BEFORE:
            self._states.append(self._before(state, token))
        else:
            self._states.append(self._reasoning(state, token, bool(following)))

    def rollback(self, count: int) -> None:
        """The last `count` tokens are removed."""
        if count:
            del self._states[-count:], self._tokens[-count:]
            for noted in (self._moved, self._ended):
                for place in [place for place in noted if place > len(self._tokens)]:
                    del noted[place]

    def fork(self) -> ReasoningConstraint:
        """An equal one, for another continuation of the output."""
        new = replace(self, start=())
        new._states, new._tokens = list(self._states), list(self._tokens)
        new._moved, new._ended = dict(self._moved), dict(self._ended)
        return new

    def follow(self, output: Sequence[int]) -> None:
        """Moves to the end of the output that it has constrained, back or on."""
        self.rollback(max(0, len(self._tokens) - len(output)))
        for token in output[len(self._tokens) :]:
            self.advance(token)

    def given(self, tokens: Sequence[int]) -> None:
        """The output goes on with tokens from outside, whatever was to follow."""
        for token in tokens:
            for noted in (self._moved, self._ended):
                noted.pop(len(self._tokens), None)
            self._states[-1] = replace(self._states[-1], extending=0)
            self.advance(token)

    # -- rules -----------------------------------------------------------------------------------

    def _used_up(self, state: State) -> bool:
        """Whether reasoning must end here."""
        limit = self.settings.reasoning
        if limit is not None and state.count >= limit:
            return True
        return self._room() <= 0

    def _room(self) -> int:
        """Tokens of reasoning for which there is room before the handover and the answer."""
        left = self.settings.max_new_tokens - len(self._tokens) - self.settings.answer
        # A tag that has been begun may be broken off, and then all of it is still to come.
        return left - len(self.marks.handover)

    def _left(self, state: State) -> int:
        """Tokens of reasoning that may still come."""
        limit = self.settings.reasoning
        return self._room() if limit is None else min(self._room(), limit - state.count)

    def _before(self, state: State, token: int) -> State:
        matched = self._matched(self.marks.opens, state.matched, token)
        if matched == len(self.marks.opening):
            return State(Phase.REASONING)
        answered = state.answered or token not in self._blank
        return State(Phase.BEFORE, matched=matched, answered=answered)

    def _reasoning(self, state: State, token: int, forced: bool) -> State:
        marks, settings = self.marks, self.settings
        need = 0 if self.ends is None else self.ends.after(state.need, token)
        more = state.count + 1
        counted = State(state.phase, more, 0, False, need, state.extended, 0, state.answered)
        done = functools.partial(replace, counted, phase=Phase.ANSWER, need=0)
        size = len(settings.extension)
        if state.extending:
            return replace(counted, extending=(state.extending + 1) % size)
        ended = self._ended.get(len(self._tokens) - 1) and token == marks.closing[state.matched]
        if forced or ended:
            matched = state.matched + 1
            if matched == len(marks.handover):
                return done(count=state.count)
            return replace(state, matched=matched, closing=True, need=0)
        if self._moved.get(len(self._tokens) - 1) and token == settings.extension[0]:
            return replace(counted, extended=state.extended + 1, extending=1 % size)
        matched = self._matched(marks.closes, state.matched, token)
        if matched == len(marks.closing):
            return done(count=state.count - (matched - 1))
        call = marks.call
        if call and tuple(self._tokens[-len(call) :]) == call:
            return done(count=state.count - (len(call) - 1), answered=True)
        return replace(counted, matched=matched) if matched else counted

    @staticmethod
    def _matched(tag: Forms, matched: int, token: int) -> int:
        """How much of a tag the newest tokens have begun."""
        if token in tag[matched]:
            return matched + 1
        return int(token in tag[0])

    def _follows(self, run: Sequence[int]) -> bool:
        """Whether the newest tokens are all of a run but its last token."""
        return len(run) == 1 or tuple(self._tokens[1 - len(run) :]) == tuple(run[:-1])

    def _mask_answer(self, scores: Tensor, state: State) -> None:
        """Reasoning is not begun again, and there is no end without an answer."""
        again = self.marks.reopening or self.marks.opening
        if again and self._follows(again):
            scores[again[-1]] = FORBIDDEN
        self._keep_characters(scores, self.settings.max_new_tokens - len(self._tokens))
        if state.answered:
            return
        scores[self._ends] = FORBIDDEN
        if len(self._tokens) + 1 >= self.settings.max_new_tokens and self._blank:
            scores[sorted(self._blank)] = FORBIDDEN

    def _mask_before(self, scores: Tensor, state: State) -> None:
        """No end without an answer, and no opening tag where there is no room for reasoning."""
        tag = self.marks.opening
        # Only the tag's last token: the others may begin something else.
        if state.matched == len(tag) - 1 and not self.may_open:
            scores[sorted(self.marks.opens[-1])] = FORBIDDEN
        if not state.answered:
            scores[self._ends] = FORBIDDEN

    def _keep_characters(self, scores: Tensor, left: int) -> None:
        """Near the end no token may begin a character that there is no room to complete."""
        if self.ends is not None and left < LONGEST_CHARACTER:
            late = [token for token, lacks in self.ends.missing.items() if lacks > left - 1]
            scores[late] = FORBIDDEN

    def _puts_off(self, state: State) -> bool:
        """Whether the closing tag would begin here, and the chain is to go on in its place."""
        settings = self.settings
        if state.matched or state.extended >= settings.extensions:
            return False
        return self._left(state) >= len(settings.extension)

    def _put_off(self, scores: Tensor, state: State) -> None:
        """Moves the closing tag's probability to the extension, where the chain is to go on."""
        settings, place = self.settings, len(self._tokens)
        self._moved.pop(place, None)
        if not self._puts_off(state):
            return
        tag, first = self.marks.closing[0], settings.extension[0]
        self._moved[place] = bool(scores[tag] >= scores[first])
        move_probability(scores, [tag], first, summed=not self.greedy)

    def _close(self, scores: Tensor, tag: int) -> None:
        """An end closes the reasoning: the tag takes its place, and all of it follows then."""
        if self._ends:
            ended = scores[self._ends].amax() >= scores[tag]
            self._ended[len(self._tokens)] = bool(ended)
            move_probability(scores, self._ends, tag, summed=not self.greedy)
