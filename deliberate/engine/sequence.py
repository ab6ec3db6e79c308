"""One sequence of a batch while it is decoded: its tokens and its state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from deliberate.config import Fidelity, KVMode
from deliberate.engine.constraints import ConstraintCursor, LogitConstraint, only
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.exit_policy import ExitAnswer, ExitPolicy, FixedPolicy
from deliberate.engine.logprobs import token_logprobs
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.loop_settings import LoopSettings
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.sampler import TokenChooser
from deliberate.kernels.native_drafted import DraftedTokens
from deliberate.trace import GenerationTrace, TokenRecord

# Every token through every layer.
_DENSE = LoopSettings((), (), Fidelity.DENSE, max_pending=1, max_new_tokens=1)
_GREEDY = TokenChooser()


class LaterEnds(NamedTuple):
    """Ids that end an output, but not among its first tokens.

    Attributes:
        after: tokens of the output that are not among them.
        tokens: the ids.
    """

    after: int
    tokens: frozenset[int]


class DecodingSequence:
    """Tokens, counters and state of one sequence, and all that was chosen for it.

    Sequences of one pass may differ in each of these. What is shared may be one object: a batch's
    settings, chooser and watch, a model's planner.

    Attributes:
        settings: what is asked for; one dense token unless given.
        chooser: how logits become tokens; greedy unless given.
        place: its sequence in the chooser.
        planner: exact mode: which exits to evaluate, and how far to draft; None: all, always.
        watch: re-weighs the logits of a long text, or None.
        lookup: drafts looked up in the text or made by a draft layer, or None.
        later_ends: ids that end the output from some token on, or None.
        policy: decides which tokens exit; shared by the sequences of a generation. By default it
            compares with the settings' thresholds.
        constraint: which tokens may come next; None: all.
        gate_threshold: top probability at full depth below which rounds of the deliberation gate
            run for its tokens; None where it is decoded without a gate.
        thresholds: least confidence to exit early, one per exit of the *runner*: infinite where no
            token of this sequence exits. What sets thresholds while decoding sets these. Minus
            infinity where the policy is shown every token.
        confident: the probability of each token that full depth chooses is kept.
        began: reading of the clock from which the seconds of its tokens count.
        multi_step: nothing needs to be done between its tokens, so that the executor may decode
            several in one call.
        multi_draft: nothing needs to be done between its drafts, so that the executor may make
            several in one call, beside other sequences.
        multi_sample: it is sampled or constrained, and its tokens depend on nothing else, so that
            the executor may choose several of it in one call, beside other sequences.
        deep_passes: how many it took part in; below 0 at first where comparisons begin later.
        index: its place among the prompts; in an engine the number of the request.
        row: its row in the cache, which changes as others finish.
        prefix: ids that a logits processor sees before the generated ones.
        prompt_tokens: tokens before the first generated one, padding not counted.
        records: generated tokens; in exact mode those after the first `verified` may be
            rolled back.
        verified: how many from the front the full depth has chosen or confirmed.
        yielded: how many the caller has got.
        exact: whether drafts are verified.
        top_logprobs: how many alternatives of each token are kept with their log-probabilities;
            None where none is needed, not the token's own either.
        keeps: whether `scores` are kept.
        processed: whether its tokens are more than the argmax of logits: processors, sampling, a
            constraint, or scores that are kept.
        blocked: its newest token did not exit and needs a deep pass.
        waited: shallow passes of other sequences since it was blocked.
        finished: its output is complete.
        scores: of each token, where they are kept: processed scores ``[1, V]``, or the
            `TokenLogprobs` where those are asked for.
        answers: index of a token, and what the exits that it did not exit at predicted for it.
    """

    __slots__ = (
        "answers",
        "began",
        "blocked",
        "chooser",
        "confident",
        "constraint",
        "deep_passes",
        "exact",
        "finished",
        "gate_threshold",
        "index",
        "keeps",
        "later_ends",
        "lookup",
        "multi_draft",
        "multi_sample",
        "multi_step",
        "place",
        "planner",
        "policy",
        "prefix",
        "processed",
        "prompt_tokens",
        "records",
        "row",
        "scores",
        "settings",
        "thresholds",
        "top_logprobs",
        "trace",
        "verified",
        "waited",
        "watch",
        "yielded",
    )

    def __init__(
        self,
        index: int,
        prefix: list[int],
        prompt_tokens: int,
        num_layers: int,
        settings: LoopSettings = _DENSE,
        *,
        chooser: TokenChooser = _GREEDY,
        place: int | None = None,
        planner: DraftPlanner | None = None,
        policy: ExitPolicy | None = None,
        watch: LongTextWatch | None = None,
        lookup: DraftSource | None = None,
        constraint: LogitConstraint | None = None,
        gate_threshold: float | None = None,
        top_logprobs: int | None = None,
        confident: bool = False,
        later_ends: LaterEnds | None = None,
        began: float = 0.0,
    ) -> None:
        self.gate_threshold = gate_threshold
        self.settings = settings
        self.chooser = chooser
        self.place = index if place is None else place
        self.planner = planner
        self.watch = watch
        self.later_ends = later_ends
        self.lookup = lookup
        self.policy = FixedPolicy(settings.thresholds) if policy is None else policy
        self.constraint = None if constraint is None else ConstraintCursor(constraint)
        self.thresholds: tuple[float, ...] = (-math.inf,) * len(settings.exits)
        if self.policy.thresholds is not None and settings.exits:
            self.thresholds = tuple(self.policy.thresholds)
        self.confident = confident or bool(settings.exits)
        self.began = began
        self.multi_step = False
        self.multi_draft = False
        self.multi_sample = False
        self.deep_passes = -self.policy.compare_offset - 1
        self.exact = settings.exact
        self.top_logprobs = top_logprobs
        self.keeps = settings.keep_scores or top_logprobs is not None
        self.processed = not chooser.plain or self.keeps or constraint is not None
        self.index = index
        self.row = index
        self.prefix = prefix
        self.prompt_tokens = prompt_tokens
        self.trace = GenerationTrace(num_layers, prompt_tokens)
        self.records: list[TokenRecord] = self.trace.records
        self.verified = 0
        self.yielded = 0
        self.blocked = False
        self.waited = 0
        self.finished = False
        self.scores: list[object] = []
        self.answers: tuple[int, dict[int, ExitAnswer]] = (0, {})

    @property
    def defers(self) -> bool:
        """Whether the layers that a token skips are run for it later."""
        return self.settings.kv_mode is KVMode.DEFER

    @property
    def gated(self) -> bool:
        """Whether it is decoded with the deliberation gate."""
        return self.gate_threshold is not None

    @property
    def pending_limit(self) -> int:
        """Tokens that may be pending above an exit now."""
        return self.settings.max_pending if self.planner is None else self.planner.cap

    def is_enabled(self, k: int) -> bool:
        """Whether exit `k` is evaluated for this sequence now."""
        if not self.settings.exits or (self.planner is not None and not self.planner.is_enabled(k)):
            return False
        # At an infinite threshold no token exits, and the head need not be run.
        return self.thresholds[k] < math.inf

    @property
    def position(self) -> int:
        """Absolute position of the newest token."""
        return self.prompt_tokens + len(self.records) - 1

    @property
    def newest(self) -> int:
        """The newest token: the prompt's last one where nothing has been generated."""
        return self.records[-1].token if self.records else self.prefix[-1]

    def newest_tokens(self, count: int) -> list[int]:
        """The newest `count` tokens, of the prompt where fewer have been generated."""
        made = [record.token for record in self.records[-count:]]
        lacking = count - len(made)
        return self.prefix[-lacking:] + made if lacking else made

    def ids(self, count: int) -> list[int]:
        """Prefix and the first `count` generated tokens."""
        return self.prefix + [record.token for record in self.records[:count]]

    def add(
        self,
        token: int,
        layer: int,
        confidence: float,
        seconds: float,
        *,
        verified: bool,
        rounds: int = 0,
    ) -> None:
        """Appends a token; the arguments are the fields of its `TokenRecord`."""
        self.records.append(TokenRecord(token, layer, confidence, seconds, verified, rounds))

    def draft(self, token: int, layer: int, confidence: float, seconds: float) -> None:
        """Appends a token that was chosen at an exit."""
        self.add(token, layer, confidence, seconds, verified=False)
        self.trace.drafted += 1

    def kept(self, token: int, logits: Tensor, scores: object) -> object:
        """What `scores` has of a token that was chosen from logits ``[V]``."""
        if self.top_logprobs is None:
            return scores
        return token_logprobs(logits, token, self.top_logprobs)

    def earlier_answers(self, exit_index: int) -> dict[int, ExitAnswer]:
        """What lower exits predicted for the next token, where that was kept."""
        index, answers = self.answers
        if index != len(self.records):
            return {}
        return {k: answer for k, answer in answers.items() if k < exit_index}

    def keep_answer(self, exit_index: int, answer: ExitAnswer) -> None:
        """Keeps what an exit predicted for the next token."""
        self.answers = (len(self.records), {**self.earlier_answers(exit_index), exit_index: answer})

    def add_forced(self, seconds: float, width: int) -> None:
        """Appends the tokens that the constraint forces after the newest one, if any.

        After a draft of exact mode they are unverified, as it is. Not among them is then what ends
        the output, which is chosen at full depth. With log-probabilities there are none: each token
        is run for its logits, and the constraint forces it there.

        Args:
            width: of the vocabulary.
        """
        if self.constraint is None or self.top_logprobs is not None:
            return
        verified = not self.records or self.records[-1].verified
        drafting = self.exact and not verified
        most = self.settings.max_new_tokens - drafting
        while following := self.constraint.forced(self.records, len(self.records)):
            for token in following:
                if len(self.records) >= most or (drafting and self.ends_with(token)):
                    return
                self.add(token, 0, 1.0, seconds, verified=verified)
                if verified:
                    self.verified = len(self.records)
                if self.settings.keep_scores:
                    self.scores.append(only(token, width))

    def ends_with(self, token: int) -> bool:
        """Whether this token after the others would end the output."""
        if self.is_end(token, len(self.records)):
            return True
        return self.constraint is not None and self.constraint.finishes(self.records, token)

    def is_end(self, token: int, index: int) -> bool:
        """Whether this token ends the output where it is generated token `index`, from 0."""
        if token in self.settings.end_tokens:
            return True
        later = self.later_ends
        return later is not None and index >= later.after and token in later.tokens

    def next_ends(self, steps: int) -> tuple[Collection[int], int]:
        """Ids that end the output within the next tokens, and how many tokens that holds for.

        Args:
            steps: tokens at most.
        """
        later, ends = self.later_ends, self.settings.end_tokens
        if later is None:
            return ends, steps
        before = later.after - len(self.records)
        return (ends, min(steps, before)) if before > 0 else (later.tokens.union(ends), steps)

    def confirm(self, index: int, rounds: int = 0) -> None:
        """The full depth chose the token at `index` too, after this many deliberation rounds."""
        old = self.records[index]
        # Not `dataclasses.replace`, which takes several times as long.
        self.records[index] = TokenRecord(
            old.token, old.exit_layer, old.confidence, old.seconds, True, rounds
        )
        self.verified = index + 1

    def add_verified(self, made: DraftedTokens, layers: int, seconds: float) -> None:
        """Appends what several full-depth passes chose, accepted drafts among it.

        Args:
            made: what the passes did, one after another.
            layers: of the model.
            seconds: since it began.
        """
        tokens, trace, unknown = iter(made.tokens), self.trace, float("nan")
        for one in made.passes:
            for token in itertools.islice(tokens, one.accepted):
                self.records.append(TokenRecord(token, 0, unknown, seconds, True))
            self.records.append(TokenRecord(next(tokens), layers, unknown, seconds, True))
            trace.drafted += one.drafted
            trace.rejected += one.accepted < one.drafted
            trace.discarded += one.drafted - one.accepted
        self.verified = len(self.records)

    def roll_back(self, index: int) -> None:
        """Removes the token at `index`, a rejected draft, and all after it."""
        self.trace.rejected += 1
        self.trace.discarded += len(self.records) - index
        del self.records[index:]
        del self.scores[index:]
        self.answers = (0, {})  # they were predicted after a text that is rolled back
        if self.constraint is not None:
            self.constraint.cut(index)

    def drop_drafts(self) -> None:
        """Removes the tokens that are not verified; they may be drafted again."""
        self.trace.discarded += len(self.records) - self.verified
        del self.records[self.verified :]
        del self.scores[self.verified :]
        self.answers = (0, {})
        if self.constraint is not None:
            self.constraint.cut(self.verified)

    def cut(self, count: int) -> None:
        """Keeps the first `count` tokens only, as after a step that failed."""
        del self.records[count:]
        del self.scores[count:]
        self.verified = min(self.verified, count)
        self.answers = (0, {})
        if self.constraint is not None:
            self.constraint.cut(count)

    def stop_at(self, count: int) -> None:
        """The output ends with its first `count` tokens, as something asked for that they met."""
        del self.records[count:]
        del self.scores[count:]
        self.verified = min(self.verified, count)
        self.trace.finish = "stop"
        if self.finished and self.watch is not None:
            self.watch.close(self)

    def is_complete(self) -> bool:
        """Whether the output is complete; the trace says why."""
        if not self.records:
            return False
        if self.is_end(self.records[-1].token, len(self.records) - 1):
            self.trace.finish = "stop"
            return True
        if self.constraint is not None and self.constraint.finished(self.records):
            self.trace.finish = "stop"
            return True
        return len(self.records) >= self.settings.max_new_tokens

    def take_accepted(self) -> list[int]:
        """Tokens accepted since the last call: verified ones in exact mode, else all."""
        end = self.verified if self.exact else len(self.records)
        tokens = [record.token for record in self.records[self.yielded : end]]
        self.yielded = end
        return tokens
