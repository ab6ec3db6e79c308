"""Forks of chains that are to go on: several continuations, of which the policy keeps one.

Each is a request with a constraint and a watch of its own. The first takes over the chain's row,
the others share what they can of its keys and values. They are sampled: by the chain's own
distribution, with noise of their place and number, so the one that is kept does not depend on what
else the engine decodes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from deliberate.config import Fidelity
from deliberate.engine.admitted import StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_confidence import OWN, WatchedConstraint
from deliberate.reasoning.running_chain import RunningChain
from deliberate.reasoning.stop_policy import Branch, Fork
from deliberate.reasoning.token_budget import ReasoningConstraint

# More than a fork has branches, so that no two forks of a chain share noise.
_NUMBERS_APART = 64


@dataclass
class _Running:
    """A continuation while it runs.

    Attributes:
        chain: that it continues.
        number: of its request.
        constraint: along it.
        likely: the same, with the log-probabilities of its tokens.
        confident: the same, with the confidences that a vote watches; None: it watches none.
        states: the watch over the text with this continuation.
        made: its tokens.
        ended: all of them are made.
    """

    chain: RunningChain
    number: int
    constraint: ReasoningConstraint
    likely: WatchedConstraint
    confident: WatchedConstraint | None
    states: LongTextWatch
    made: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def branch(self) -> Branch:
        """What the policy reads of it."""
        logprobs = self.likely.confidences[: len(self.made)]
        last = self.states.earlier + len(self.made) - 1
        mean = sum(logprobs) / max(1, len(logprobs))
        return Branch(tuple(self.made), mean, self.states.statistic(last))


class ChainForks:
    """The continuations of all chains that fork.

    Args:
        engine: decodes them.
        end_tokens: that end an output.
    """

    def __init__(self, engine: Engine, end_tokens: Collection[int]) -> None:
        self._engine = engine
        self._end_tokens = end_tokens
        self._running: dict[int, _Running] = {}

    def __bool__(self) -> bool:
        """Whether any runs."""
        return bool(self._running)

    def begin(self, chain: RunningChain, fork: Fork) -> bool:
        """Begins the continuations of a chain; False where what comes next is forced, or its
        budget, to which all of them are charged, has no room for them."""
        room = not chain.request.charged or chain.room >= fork.branches * fork.tokens
        if chain.states is None or chain.constraint.forced() or not room:
            return False
        request, prompt = chain.request, chain.prompt()
        start, spec = len(chain.tokens.output), request.spec
        base = TokenChooser() if request.sampling is None else request.sampling(start)
        dense = DecodingSpec(
            fidelity=Fidelity.DENSE,
            gate=spec.gate,
            kv_storage=spec.kv_storage,
            long_text=spec.long_text,
        )
        for place in range(fork.branches):
            constraint: Any = chain.constraint.fork()
            watch = request.watch
            confident = None if watch is None else WatchedConstraint(constraint, watch.top)
            likely = WatchedConstraint(confident or constraint, OWN)
            states = chain.states.fork()
            number = self._engine.add(
                Request(
                    prompt,
                    min(fork.tokens, chain.left),
                    dense,
                    sampling=base.drawn(start * _NUMBERS_APART + place),
                    end_tokens=self._end_tokens,
                    constraint=likely,
                    watch=states,
                    hold=True,
                    after=None if place else chain.newest,
                )
            )
            self._running[number] = _Running(chain, number, constraint, likely, confident, states)
        return True

    def took(self, output: StepOutput) -> RunningChain | None:
        """Takes an output; the chain that has got its continuation by it, which then goes on."""
        own = self._running.get(output.id)
        if own is None:
            return None
        own.made += output.tokens
        own.ended = output.finished is not None
        siblings = [one for one in self._running.values() if one.chain is own.chain]
        if not all(one.ended for one in siblings):
            return None
        for one in siblings:
            del self._running[one.number]
        self._keep(own.chain, siblings)
        return own.chain

    def _keep(self, chain: RunningChain, found: list[_Running]) -> None:
        """The chain goes on as its policy chooses."""
        policy: Any = chain.request.policy
        kept = found[policy.on_branches([one.branch for one in found])]
        for one in found:
            if one is not kept:
                self._engine.release(one.number)
                chain.result.rolled_back += len(one.made)
        for token in kept.made:
            chain.tokens.add(token)
        kept.constraint.follow(chain.tokens.output)
        if kept.confident is not None:
            chain.result.confidences += kept.confident.confidences[: len(kept.made)]
        chain.constraint, chain.states, chain.newest = kept.constraint, kept.states, kept.number
        chain.result.forks += 1
        chain.free, chain.probed, chain.made = None, False, []
