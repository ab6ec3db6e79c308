"""Runs chains of reasoning in an engine: policies decide, probes are forks, budgets hold.

A chain is decoded in stretches. A stretch ends where the chain's policy is due; the policy then
lets the chain go on, forces tokens, ends it, or has it probed. A probe and the next stretch take
over the row of the chain's newest request. Far from any limit, greedy tokens are decoded without
the limits' constraint, several in a call of the executor; from the first one that the constraint
would have changed on they are discarded. The chain does not run on while it is probed, so its
output does not depend on what else the engine decodes. The chains of one call run together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from deliberate.config import Fidelity
from deliberate.engine.admitted import StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.sequence import LaterEnds
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_confidence import WatchedConstraint
from deliberate.reasoning.chain_forks import ChainForks
from deliberate.reasoning.chain_output import ChainResult, ChainTokens
from deliberate.reasoning.chain_probes import Decode, Due, Prober
from deliberate.reasoning.loop_rollback import roll_back
from deliberate.reasoning.marks import ReasoningMarks, Utf8Ends
from deliberate.reasoning.running_chain import ChainRequest, RunningChain
from deliberate.reasoning.stop_policy import (
    Action,
    Force,
    Fork,
    Probe,
    Quiet,
    Rollback,
    Stop,
    show,
)
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.reasoning.variance import watched_spec
from deliberate.utils.errors import DeliberateError

# So many tokens that are certain to be wanted make a stretch without the constraint worth its pass.
_FREELY_FROM = 8
# More tokens than an output has.
_NEVER = 1 << 30


class ChainRunner:
    """Runs chains in an engine.

    Args:
        engine: decodes; other requests may be in it.
        marks: around the reasoning; `ReasoningMarks.answer` is put before a probe's answer.
        decode: text of token ids.
        end_tokens: that end an output.
        ends, blank: as for `ReasoningConstraint`.
        probe_spec: how probes are decoded.
        clock: seconds, monotonic.
        freely_from: fewest tokens of a stretch without the constraint; None: there is none.
        check: called before every step; what it raises ends the chains of the call.
    """

    def __init__(
        self,
        engine: Engine,
        marks: ReasoningMarks,
        decode: Decode,
        *,
        end_tokens: Collection[int],
        ends: Utf8Ends | None = None,
        blank: Collection[int] = (),
        probe_spec: DecodingSpec | None = None,
        clock: Callable[[], float] = time.perf_counter,
        freely_from: int | None = _FREELY_FROM,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if not end_tokens:
            raise DeliberateError("end_tokens is empty: a chain's answer could not end")
        self._engine = engine
        self._marks = marks
        self._decode = decode
        self._end_tokens = frozenset(end_tokens)
        self._ends = ends
        self._blank = frozenset(blank)
        spec = probe_spec or DecodingSpec(fidelity="dense")  # type: ignore[arg-type]
        self._probes_dense = spec.fidelity is Fidelity.DENSE
        self._prober = Prober(engine, marks, decode, end_tokens, spec)
        self._clock = clock
        self._freely_from = _NEVER if freely_from is None else freely_from
        self._check = check
        self._chains: dict[int, RunningChain] = {}
        self._forks = ChainForks(engine, self._end_tokens)

    def least(self, budget: BudgetSettings) -> int:
        """Tokens of the shortest chain with these limits."""
        return self._marks.least(budget.answer)

    def run(self, requests: Sequence[ChainRequest]) -> list[ChainResult]:
        """Runs the chains together to their ends.

        Raises:
            DeliberateError: a request that the engine cannot decode.
        """
        now = self._clock()
        requests = [replace(one, spec=watched_spec(one.spec, one.policy)) for one in requests]
        chains = [RunningChain(one, self._marks, self._constraint(one), now) for one in requests]
        with self._engine.constant_weights():
            for chain in chains:
                self._go_on(chain)
            while self._chains or self._forks:
                self._check()
                for output in self._engine.step():
                    if (forked := self._forks.took(output)) is not None:
                        self._follow(forked)
                        continue
                    if (running := self._chains.get(output.id)) is None:
                        continue
                    running.made += output.tokens
                    if output.finished is not None:
                        del self._chains[output.id]
                        self._stretch_ended(running, output)
        return [chain.result for chain in chains]

    def probe(
        self,
        requests: Sequence[ChainRequest],
        results: Sequence[ChainResult],
        due: Due,
        most: int,
        *,
        in_flight: int = 16,
    ) -> None:
        """Puts probes into the results of finished chains, as `Prober.probes_of` makes them."""
        chains = [(a.prompt_ids, b.tokens) for a, b in zip(requests, results, strict=True)]
        with self._engine.constant_weights():
            found = self._prober.probes_of(chains, due, most, in_flight)
        for result, probes in zip(results, found, strict=True):
            result.probes = probes

    # -- stretches and probes --------------------------------------------------------------------

    def _constraint(self, request: ChainRequest) -> ReasoningConstraint:
        return ReasoningConstraint(
            request.budget,
            self._marks,
            self._end_tokens,
            self._ends,
            self._blank,
            greedy=request.sampling is None,
        )

    def _go_on(self, chain: RunningChain) -> None:
        """Begins the next stretch, up to where the policy is due or to the end."""
        request, constraint = chain.request, chain.constraint
        chain.limit()
        chain.free = chain.quiet(self._freely_from)
        if chain.free is None:
            self._go_on_constrained(chain)
            return
        quiet, room = chain.free, constraint.free()
        if quiet.most is not None:
            room = min(room, quiet.most + 1)
        chain.made, chain.probed = [], False
        self._begin(
            chain,
            Request(
                [*request.prompt_ids, *chain.tokens.output],
                room,
                request.spec,
                end_tokens=self._end_tokens,
                later_ends=LaterEnds(quiet.count, quiet.ends) if quiet.ends else None,
                hold=True,
                after=chain.newest,
            ),
        )

    def _go_on_constrained(self, chain: RunningChain) -> None:
        """A stretch whose every token the constraint looks at."""
        request, done = chain.request, chain.tokens
        forced = len(chain.constraint.forced())
        limit = 1 if chain.changed or chain.waiting is not None else forced or chain.left
        watch, confidences = request.watch, chain.result.confidences
        chain.watched = None if watch is None else WatchedConstraint(chain.constraint, watch.top)
        so_far = ChainTokens(self._marks, done.output)

        def stop(output: Sequence[int]) -> bool:
            so_far.add(output[-1])
            if not so_far.reasons:
                return False
            if watch is not None and chain.watched is not None:
                made = chain.watched.confidences[: len(output)]
                chain.result.killed = watch.weak([*confidences, *made][-watch.window :])
            policy = request.policy
            if policy is not None and chain.states is not None:
                show(policy, chain.states.statistic(chain.states.earlier + len(output) - 1))
            return chain.result.killed or (policy is not None and policy.due(so_far.reasoning))

        chain.made, chain.probed = [], False
        self._begin(
            chain,
            Request(
                chain.prompt(),
                min(limit, chain.left),
                request.spec,
                sampling=None if request.sampling is None else request.sampling(len(done.output)),
                end_tokens=self._end_tokens,
                stop=None if request.policy is None and watch is None else stop,
                constraint=chain.watched or chain.constraint,
                watch=chain.states,
                hold=True,
                after=chain.newest,
            ),
        )

    def _begin(self, chain: RunningChain, request: Request) -> None:
        chain.newest = self._engine.add(request)
        self._chains[chain.newest] = chain
        chain.request.heard(chain.tokens.output)

    def _stretch_ended(self, chain: RunningChain, last: StepOutput) -> None:
        if chain.probing:
            self._probed(chain, last)
            return
        if chain.free is not None:
            self._accept(chain, chain.free)
        else:
            chain.changed = False
            for token in chain.made:
                chain.tokens.add(token)
            chain.constraint.follow(chain.tokens.output)
            chain.note(last.trace)
        if chain.watched is not None:
            chain.result.confidences += chain.watched.confidences[: len(chain.made)]
        if self._ended(chain) or chain.left <= 0 or chain.result.killed:
            self._finish(chain)
            return
        waiting, chain.waiting = chain.waiting, None
        if waiting is not None and chain.tokens.reasons:
            self._act(chain, waiting)
            return
        if chain.changed or not chain.due:
            self._go_on(chain)
            return
        assert chain.request.policy is not None  # it was due
        self._act(chain, chain.request.policy.on_step(chain.tokens.reasoning))

    def _accept(self, chain: RunningChain, quiet: Quiet) -> None:
        """Takes the tokens of a free stretch, up to one that the constraint would have changed."""
        for number, token in enumerate(chain.made, start=1):
            if chain.constraint.changes(token):
                chain.changed = True
                return
            chain.tokens.add(token)
            chain.constraint.advance(token)
            if number > quiet.count and chain.due:
                return

    def _act(self, chain: RunningChain, action: Action) -> None:
        if isinstance(action, Stop | Probe) and chain.constraint.within_character:
            chain.waiting = action  # neither cuts it
            self._go_on(chain)
            return
        if isinstance(action, Probe) and chain.answer_room(action) >= 1:
            self._probe(chain, action)
            return
        if isinstance(action, Stop):
            chain.result.stopped, chain.result.gave_up = action.reason, action.gave_up
            chain.take(self._marks.rest(chain.tokens.output))
            if self._answered_by_probe(chain):
                self._accept(chain, Quiet(_NEVER))
        elif isinstance(action, Fork):
            if self._forks.begin(chain, action):
                chain.request.heard(chain.tokens.output)
                return
        elif isinstance(action, Rollback):
            roll_back(chain, action, self._marks)
        elif isinstance(action, Force):
            self._check_room(chain, action.tokens)
            chain.take(action.tokens)
        self._follow(chain)

    def _follow(self, chain: RunningChain) -> None:
        """What comes after an action."""
        if chain.left <= 0 or self._ended(chain):
            self._finish(chain)
        else:
            self._go_on(chain)

    def _ended(self, chain: RunningChain) -> bool:
        return bool(self._end_tokens.intersection(chain.tokens.output[-1:]))

    def _answered_by_probe(self, chain: RunningChain) -> bool:
        """Whether the newest probe has decoded what follows the handover, so that it is known."""
        if not self._probes_dense or not chain.probed or not chain.freely:
            return False
        return chain.constraint.free() >= max(self._freely_from, len(chain.made))

    def _check_room(self, chain: RunningChain, tokens: Sequence[int]) -> None:
        """Refuses forced tokens that do not fit the budget, which would not hold then."""
        budget = chain.request.budget
        room = chain.left - len(self._marks.handover) - budget.answer
        if budget.reasoning is not None:
            room = min(room, budget.reasoning - len(chain.tokens.reasoning))
        if len(tokens) > room:
            raise DeliberateError(
                f"a stop policy forces {len(tokens)} tokens where the budget has room for {room}: "
                "it must not"
            )

    def _probe(self, chain: RunningChain, probe: Probe) -> None:
        chain.probing, chain.made = True, []
        text = chain.request.prompt_ids, chain.tokens.output, chain.answer_room(probe)
        how: dict[str, Any] = {"after": chain.newest, "hold": True, "answered": chain.answered}
        self._begin(chain, self._prober.request(*text, **how))

    def _probed(self, chain: RunningChain, last: StepOutput) -> None:
        at = len(chain.tokens.reasoning)
        trial, record = self._prober.answered(at, chain.made, last)
        chain.result.probes.append(record)
        chain.probing, chain.probed, chain.answered = False, True, chain.made
        assert chain.request.policy is not None  # it asked for the probe
        action = chain.request.policy.on_probe(trial)
        if isinstance(action, Probe):
            raise DeliberateError("a stop policy answers a probe with another probe: it must not")
        chain.limit()
        self._act(chain, action)

    def _finish(self, chain: RunningChain) -> None:
        result, tokens = chain.result, chain.tokens
        if chain.newest is not None:
            self._engine.release(chain.newest)
        result.tokens = list(tokens.output)
        result.reasoning_tokens = len(tokens.reasoning)
        answer = [token for token in tokens.answer if token not in self._end_tokens]
        result.answer = self._decode(answer).strip()
        result.finished = bool(tokens.output) and tokens.output[-1] in self._end_tokens
        result.seconds = self._clock() - chain.began
