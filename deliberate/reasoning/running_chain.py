"""A chain of reasoning: what is asked for, and its state while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from deliberate.config import Fidelity
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_confidence import ConfidenceWatch, WatchedConstraint
from deliberate.reasoning.chain_output import ChainResult, ChainTokens
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.stop_policy import Probe, Quiet, Stop, StopPolicy, quiet_after
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.trace import GenerationTrace

# Whose tokens are greedy choices: what follows a discarded one may be discarded too. Those with
# thresholds depend on where stretches begin, since the first of each is chosen at full depth.
_GREEDY = (Fidelity.DENSE, Fidelity.EXACT, Fidelity.THRESHOLD)


@dataclass(frozen=True, eq=False)
class ChainRequest:
    """One chain and its answer.

    Attributes:
        prompt_ids: token ids.
        budget: the limits of the output.
        policy: of this chain alone; None: it ends by itself or by its budget.
        spec: how it is decoded.
        sampling: how logits become tokens from the given token of the output on, so that every
            stretch draws noise of its own; None for greedy decoding.
        watch: of the confidence of its tokens; None: it is not taken.
        heard: given the output so far whenever the chain goes on or is probed.
        charged: its probes and the tokens that are rolled back count as tokens of its output do, so
            that all of them together are no more than ``budget.max_new_tokens``.
    """

    prompt_ids: Sequence[int]
    budget: BudgetSettings
    policy: StopPolicy | None = None
    spec: DecodingSpec = field(default_factory=DecodingSpec)
    sampling: Callable[[int], TokenChooser] | None = None
    watch: ConfidenceWatch | None = None
    heard: Callable[[Sequence[int]], None] = lambda _: None
    charged: bool = False


class RunningChain:
    """A chain while it runs.

    Attributes:
        free: of the running stretch, where it is decoded without the constraint.
        changed: the constraint gives another token than a greedy choice, here.
        waiting: what the policy has asked for within a character, until that is whole.
        made: tokens of the running stretch or probe, or of the newest one.
        newest: number of its newest request, whose keys and values the next one takes over.
        probing: the running one is a probe.
        probed: the newest one was a probe.
        answered: tokens of its newest probe's answer.
        states: the watch over its text, where its spec has ``long_text``; else None.
    """

    def __init__(
        self,
        request: ChainRequest,
        marks: ReasoningMarks,
        constraint: ReasoningConstraint,
        now: float,
    ) -> None:
        self.request = request
        self.tokens = ChainTokens(marks)
        self.result = ChainResult()
        self.began = now
        self.constraint = constraint
        self.free: Quiet | None = None
        self.changed = False
        self.waiting: Stop | Probe | None = None
        self.watched: WatchedConstraint | None = None
        self.probing = False
        self.probed = False
        self.newest: int | None = None
        self.answered: list[int] = []
        self.made: list[int] = []
        self._handover = len(marks.handover)
        rule = request.spec.long_text
        self.states = None if rule is None else LongTextWatch(rule)

    @property
    def most(self) -> int:
        """Tokens that the output may have."""
        spent = self.result.probe_tokens + self.result.rolled_back if self.request.charged else 0
        return self.request.budget.max_new_tokens - spent

    @property
    def left(self) -> int:
        """Tokens that the output may still have."""
        return self.most - len(self.tokens.output)

    @property
    def due(self) -> bool:
        """Whether the policy is due after the newest token, none being forced to follow."""
        policy = self.request.policy
        if policy is None or not self.tokens.reasons or self.constraint.forced():
            return False
        return policy.due(self.tokens.reasoning)

    @property
    def freely(self) -> bool:
        """Whether its tokens are greedy, and few of them such as the constraint changes."""
        spec, without = self.request.spec, self.request.budget.suppressed
        greedy = spec.fidelity in _GREEDY and not (spec.strict or without)
        return greedy and spec.long_text is None and self.request.watch is None

    def limit(self) -> None:
        """Tells the constraint what holds from here on: a sure chain's end is not put off."""
        budget, most = self.request.budget, self.most
        if budget.extensions and not getattr(self.request.policy, "doubtful", True):
            budget = replace(budget, extensions=0)
        if most != budget.max_new_tokens:
            budget = replace(budget, max_new_tokens=most)
        self.constraint.settings = budget

    def prompt(self) -> list[int]:
        """Ids of the next stretch's prompt, which its watch is told of."""
        if self.states is not None:
            self.states.follow(self.tokens.output)
        return [*self.request.prompt_ids, *self.tokens.output]

    def note(self, trace: GenerationTrace | None) -> None:
        """What the watch of the states did in a stretch that has ended, by its request's trace."""
        if self.states is not None and trace is not None:
            earlier = self.states.earlier
            self.result.triggers += [earlier + trigger.index for trigger in trace.triggers]
            self.result.reweighed += trace.reweighed

    def take(self, tokens: Sequence[int]) -> None:
        """The output goes on with tokens that were not decoded."""
        self.constraint.given(tokens)
        for token in tokens:
            self.tokens.add(token)

    def quiet(self, least: int) -> Quiet | None:
        """When the policy may be due next; None where the next tokens must be looked at one by one,
        or there is no room for `least` of them."""
        if self.changed or self.waiting is not None or not self.freely:
            return None
        if self.constraint.free() < least:
            return None
        policy = None if self.tokens.closed else self.request.policy
        return quiet_after(policy, self.tokens.reasoning)

    @property
    def room(self) -> int:
        """Tokens that it may still make before its answer."""
        return self.left - self._handover - self.request.budget.answer

    def answer_room(self, probe: Probe) -> int:
        """Tokens that a probe may answer: no more than an answer here could have, and where they
        are charged, no more than leaves room for an answer. Below 1 there is no room for it."""
        left = self.left - self._handover
        if self.request.charged:
            left -= self.request.budget.answer
        return min(probe.max_new_tokens, left)
