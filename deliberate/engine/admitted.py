"""One request inside the engine, what it hands out, and what the engine counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.config import MAX_CALL_STEPS
from deliberate.engine.logprobs import TokenLogprobs
from deliberate.engine.ngram_drafts import DraftSource, NgramDrafts, same_source
from deliberate.engine.policy_run import PolicyRun
from deliberate.engine.prefill import Refill
from deliberate.engine.request import Decoding, Request, watch_of
from deliberate.engine.sampled_steps import chosen_freely
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.step_plan import RequestView, SequenceView
from deliberate.engine.strict import NearTies
from deliberate.trace import BatchTrace, GenerationTrace
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class StepOutput:
    """What a step made of one request.

    Attributes:
        id: number of the request.
        tokens: accepted since its last output, never to be rolled back.
        finished: "stop" or "length" where the answer is complete, else None.
        trace: of the whole answer, once it is complete.
        budget: what its exit policy has to say of the answer, once it is complete: of a latency
            budget the `BudgetReport`, else None.
        exit_layers: of the tokens: layers below the exit that chose each, as in `TokenRecord`.
        logprobs: of the tokens, where the request asked for them, else empty.
    """

    id: int
    tokens: list[int]
    finished: str | None
    trace: GenerationTrace | None
    budget: Any = None
    exit_layers: list[int] = dataclasses.field(default_factory=list)
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass
class EngineStats:
    """Counts since the engine was made, and its present state.

    Attributes:
        running, waiting: requests with and without a cache row.
        free_blocks: of the cache; rows, where it is not made of blocks.
        added, finished, aborted, preempted: requests; the last counts every preemption.
        steps: so far.
        seconds: in them.
        tokens: accepted.
        prefilled: tokens of prompts, and of what was run again.
        passes, rows: by segment: passes, and the sequences in them.
    """

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    added: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    prefilled: int = 0
    passes: dict[int, int] = dataclasses.field(default_factory=dict)
    rows: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Accepted tokens over the seconds of all steps."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def depth(self) -> float:
        """Segments run for a sequence, as a share of those that its first segment began."""
        shallow = self.rows.get(0, 0) * (1 + max(self.rows, default=0))
        return sum(self.rows.values()) / shallow if shallow else 0.0

    def copied(self, running: int, waiting: int, free_blocks: int) -> EngineStats:
        """A copy with the present state."""
        return dataclasses.replace(
            self,
            running=running,
            waiting=waiting,
            free_blocks=free_blocks,
            passes=dict(self.passes),
            rows=dict(self.rows),
        )

    def note_step(self, trace: BatchTrace, outputs: Sequence[StepOutput], seconds: float) -> None:
        """Adds a step, and empties the trace of what it ran."""
        self.steps += 1
        self.seconds += seconds
        self.tokens += sum(len(output.tokens) for output in outputs)
        self.finished += sum(output.finished is not None for output in outputs)
        for one in trace.passes:
            self.passes[one.segment] = self.passes.get(one.segment, 0) + 1
            self.rows[one.segment] = self.rows.get(one.segment, 0) + one.rows
        trace.clear()


class Admitted:
    """A request from `Engine.add` to its end: its sequence, and where it is in its life.

    Args:
        number: of the request.
        request, decoding: what is asked for.
        boundaries: of the engine's segments.
        now: reading of the clock when it was asked for.

    Attributes:
        sequence: its tokens and settings.
        refill: what must be run before it decodes.
        prefilling: it has a row, and `refill` has not been run to its end.
        steady: nothing needs to be done between its tokens, once it decodes.
        most_tokens: that its row may come to hold.
        policy_run: of its exit policy.
        cache_row: of the cache that holds the beginning of its prompt already, or None.
        drafts_aside: of the request whose row it took over, where it has no drafts itself: for the
            one that takes over its row.
        near_ties: strict exact mode: finds the tokens that dense's own passes choose; else None.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        decoding: Decoding,
        boundaries: Sequence[int],
        now: float,
    ) -> None:
        settings = decoding.settings
        self.number = number
        self.request = request
        self.arrival = now if request.arrival is None else request.arrival
        self.deadline = request.deadline
        if self.deadline is None and decoding.seconds is not None:
            self.deadline = self.arrival + decoding.seconds
        drafts = decoding.drafts
        if drafts is None and settings.lookup_tokens:
            drafts = NgramDrafts(settings.lookup_tokens)
        prompt, row = list(request.prompt_ids), decoding.batch_row
        self.sequence = DecodingSequence(
            number,
            prompt if row is None else row.prefix,
            len(prompt),
            boundaries[-1],
            settings,
            chooser=request.sampling or TokenChooser(),
            place=0 if row is None else row.place,
            planner=decoding.planner,
            lookup=drafts,
            policy=decoding.exit_policy if row is None else row.policy_run.policy,
            constraint=request.constraint,
            watch=watch_of(request, settings),
            gate_threshold=decoding.gate_threshold,
            top_logprobs=request.top_logprobs,
            confident=request.confidences,
            later_ends=request.later_ends,
            began=now,
        )
        policy = PolicyRun(self.sequence.policy, len(boundaries) - 1)
        self.policy_run = policy if row is None else row.policy_run
        self.policy_run.sequences.append(self.sequence)
        self.sequence.multi_draft = self._drafts_freely
        freely = chosen_freely(self.sequence, request.constraint)
        self.sequence.multi_sample = freely and self.policy_run.compares
        self._planner = decoding.planner if row is None else None
        self.cache_row = None if row is None else row.cache_row
        self.near_ties: NearTies | None = None
        self.refill = Refill(self.sequence)
        if request.drafts:
            self.refill.drafts = self._drafts(request)
        if row is not None:
            self.refill.tokens = prompt  # with the ids of images, which its prefix has not
        self.prefilling = False
        self.drafts_aside: DraftSource | None = None
        self.steady = False
        self.most_tokens = len(prompt) + request.max_new_tokens
        self._blocked_since = 0.0
        self._progressed = False
        if row is None:
            began = min(now, self.arrival)  # what it waited before the engine heard of it counts
            self.policy_run.begin(began, len(prompt), settings.max_new_tokens)

    def _drafts(self, request: Request) -> list[int]:
        """The drafts of a request, as many as its answer has room for.

        Raises:
            DeliberateError: its tokens are not the argmax of logits.
        """
        sequence = self.sequence
        settings, unverified = sequence.settings, sequence.settings.exits and not sequence.exact
        own = sequence.processed or sequence.watch is not None or settings.strict is not None
        if own or sequence.gated or unverified:
            raise DeliberateError(
                "drafts of a request whose tokens are sampled, constrained, re-weighed, strict, "
                "deliberated or not verified: leave drafts out, they are compared with the most "
                "likely tokens at full depth"
            )
        return list(request.drafts)[: request.max_new_tokens - 1]

    @property
    def _drafts_freely(self) -> bool:
        """Whether nothing needs to be done between its drafts."""
        sequence, compares = self.sequence, self.policy_run.compares
        return compares and sequence.exact and sequence.watch is None and not sequence.processed

    @property
    def shared(self) -> list[int]:
        """The tokens of which the cache may hold the beginning already, if not all of them.

        None with a gate: it attends to final states, which the cache does not hold. None in strict
        mode either: what others ran need not be dense's own.
        """
        alone = self.sequence.gated or self.near_ties is not None
        return [] if alone else self.refill.tokens[: self.refill.plain]

    # -- what the scheduler sees -----------------------------------------------------------------

    def waiting_view(self, cached: int = 0, block_size: int = 0) -> RequestView:
        """While it waits.

        Args:
            cached: its first tokens that are in the cache already.
            block_size: tokens of a block, where rows share blocks.
        """
        return RequestView(
            self.number,
            len(self.refill.tokens),
            self.arrival,
            self.request.priority,
            self.deadline,
            cached=cached,
            keys=self.refill.keys(block_size)[cached // block_size :] if block_size else (),
            made=len(self.sequence.records),
            limit=self.request.max_new_tokens,
            traffic=self.request.traffic,
        )

    def running_view(
        self, runner: SegmentRunner, block_size: int = 0, *, alone: bool = False
    ) -> SequenceView:
        """While it has a row; as for `waiting_view`.

        Args:
            alone: there is no other request.
        """
        sequence, tokens = self.sequence, len(self.refill.tokens)
        length = runner.cache.length(0, sequence.row)
        blocks = -(-length // block_size) if block_size else 0
        return SequenceView(
            self.number,
            length if self.prefilling else max(length, tokens),
            tokens,
            self.arrival,
            self.request.priority,
            self.deadline,
            capacity=blocks * block_size,
            own_blocks=blocks,
            growth=max(
                MAX_CALL_STEPS if alone else 1,
                1 + (0 if sequence.lookup is None else sequence.lookup.most),
            ),
            blocked=sequence.blocked,
            waited=sequence.waited,
            blocked_since=self._blocked_since,
            # Only a sequence that verifies drafts may join: another would emit something else.
            pending=runner.pending_at_first_exit(sequence) if sequence.exact else 0,
            max_pending=sequence.pending_limit,
            progressed=self._progressed or (not self.prefilling and length > tokens),
            keys=self.refill.keys(block_size)[length // block_size :]
            if block_size and self.prefilling
            else (),
            made=len(sequence.records),
            limit=self.request.max_new_tokens,
            traffic=self.request.traffic,
        )

    # -- while it runs -----------------------------------------------------------------------------

    def prefilled(self, runner: SegmentRunner) -> None:
        """All of `refill` has been run."""
        self.prefilling = False
        sequence = self.sequence
        free = sequence.watch is None and not sequence.gated
        self.steady = self.policy_run.compares and free and not sequence.processed
        # What waited for a deep pass waits for it again.
        sequence.blocked = not self.refill.new and self._was_blocked(runner)

    def _was_blocked(self, runner: SegmentRunner) -> bool:
        return runner.cache.length(0, self.sequence.row) > self.sequence.position

    def plan_drafts(self, running: int) -> None:
        """Plans its drafts as where so many sequences run; not those of a generation's rows."""
        if self._planner is not None:
            self.sequence.planner = self._planner.of_load(running)
        if self.sequence.lookup is not None:
            self.sequence.lookup.on_load(running)

    def note_blocked(self, now: float) -> None:
        """After a step: since when it has been blocked."""
        if not self.sequence.blocked:
            self._blocked_since = math.inf
        elif self._blocked_since == math.inf:
            self._blocked_since = now

    def take_over(self, held: Admitted, kept: int) -> None:
        """It runs in the row of a request that has ended, whose first `kept` tokens are its own."""
        sequence = self.sequence
        sequence.row = held.sequence.row
        drafts = held.sequence.lookup or held.drafts_aside
        if drafts is not None:
            drafts.rewind(kept)
            own = sequence.lookup
            if own is None:
                self.drafts_aside = drafts
            elif same_source(own, drafts):
                sequence.lookup = drafts
            else:
                drafts.forget()
        # Where the prompt's last token alone is to be run, it is decoded like any token: but not
        # where it could exit unverified, since an answer's first token is chosen at full depth, and
        # not under a constraint, which may force it.
        free = sequence.exact or not sequence.settings.exits
        free = free and sequence.constraint is None and sequence.watch is None
        self.prefilling = not (free and kept == len(self.refill.tokens) - 1)
        # It has no blocks set aside, so that it may have to go before it has gained a token.
        self._progressed = True

    def preempted(self, held: Sequence[int]) -> None:
        """Its row was closed; each segment's layers held so many tokens."""
        sequence = self.sequence
        if held and sequence.exact:
            sequence.drop_drafts()
        self.refill = Refill(sequence, held)
        if self.near_ties is not None:
            self.near_ties.begin(sequence.prompt_tokens)  # what follows is run again in one pass
        self.prefilling = False
        self._progressed = False
        sequence.blocked, sequence.waited = False, 0

    def output(self, now: float) -> StepOutput | None:
        """What it has made since its last output; None for nothing."""
        sequence = self.sequence
        complete = sequence.is_complete()
        first = sequence.yielded
        tokens = sequence.take_accepted()
        cut = self._stops_at(first, tokens)
        if cut is not None:
            tokens = tokens[: cut - first]
            sequence.stop_at(cut)
            complete = True
        self._progressed = self._progressed or bool(tokens)
        last = first + len(tokens)
        layers = [one.exit_layer for one in sequence.records[first:last]]
        kept: Any = () if sequence.top_logprobs is None else sequence.scores[first:last]
        if complete:
            self.end(now)
            trace, report = sequence.trace, self.policy_run.policy.report
            return StepOutput(self.number, tokens, trace.finish, trace, report, layers, kept)
        if not tokens:
            return None
        return StepOutput(self.number, tokens, None, None, exit_layers=layers, logprobs=kept)

    def _stops_at(self, first: int, tokens: Sequence[int]) -> int | None:
        """How long the answer is where the request's `stop` ends it among its newest tokens."""
        if self.request.stop is None:
            return None
        made = [record.token for record in self.sequence.records[:first]]
        for index, token in enumerate(tokens):
            made.append(token)
            if self.request.stop(list(made)):
                return first + index + 1
        return None

    def end(self, now: float) -> None:
        """Its output is complete."""
        sequence = self.sequence
        sequence.finished = True
        sequence.trace.seconds = now - sequence.began
        if sequence.watch is not None:
            sequence.watch.close(sequence)
        if not self.policy_run.of_generation:
            self.policy_run.end(now)
