"""What the engine is asked for: one request, and how it is decoded once that has been resolved."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from deliberate.engine.constraints import LogitConstraint
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.exit_policy import ExitPolicy
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.loop_settings import LoopSettings
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.policy_run import PolicyRun
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.sequence import LaterEnds
from deliberate.engine.spec import DecodingSpec
from deliberate.engine.step_plan import Traffic
from deliberate.modeling.seen_rows import SeenRun
from deliberate.utils.errors import DeliberateError

_CONSTRAINT = ("advance", "finished", "forced", "mask", "rollback")
# Called with the output so far, one accepted token longer each time; True ends it there.
Stop = Callable[[Sequence[int]], bool]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, and everything that was chosen for its answer.

    Attributes:
        prompt_ids: token ids, at least one; lists and tensors are taken too.
        max_new_tokens: length of the answer, at least 1.
        spec: how it is decoded.
        sampling: how logits become tokens, with a seed of its own; None for greedy decoding.
        end_tokens: ids that end the answer; None for those of the model.
        later_ends: further ids that end it, from some token on; None: there are none.
        constraint: which tokens may come next, at the beginning of the answer; of this request
            alone. None: all.
        watch: over the text that this answer continues, of which `LongTextWatch.follow` names what
            is in the prompt; None: the answer is the whole text, where its spec has ``long_text``.
        stop: called with the answer at every accepted token, in order; True ends it there.
        budget: fidelity ``budget``: how long the answer may take, from its arrival on; in the
            forms that `AdaptiveModel.generate` takes as ``latency_budget``.
        top_logprobs: alternatives of each token that are handed out with log-probabilities, beside
            the token's own (`TokenLogprobs`); None: no log-probabilities.
        priority: a higher number is more urgent.
        traffic: what its client is like; read by `deliberate.engine.feedback_scheduler` alone.
        drafts: ids with which its answer is expected to begin, verified at full depth in the pass
            of its prompt's end. For greedy decoding without a constraint; not read where rotary
            frequencies follow the length of the text.
        confidences: its trace has the probability of each token at full depth where it is decoded
            dense and greedily, whether or not the model has exits.
        hold: its keys and values are kept after its end, for a request that comes `after` it; only
            within `Engine.constant_weights`, at whose end they are given up.
        after: number of a request that was held: its keys and values are taken over as far as the
            tokens are the same, and with them its row, so that it waits for none. What cannot be
            taken over is run again.
        arrival: second of the engine's clock; None for that of `Engine.add`.
        deadline: second of that clock by which it should be finished; None for that of a budget,
            if it has one. It orders requests; nothing is given up when it has passed.
        seen: embeddings of the images among its ids, which stay known while the request lives;
            `Engine.add` fills them in.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    spec: DecodingSpec = field(default_factory=DecodingSpec)
    sampling: TokenChooser | None = None
    end_tokens: Collection[int] | None = None
    later_ends: LaterEnds | None = None
    stop: Stop | None = None
    constraint: LogitConstraint | None = None
    watch: LongTextWatch | None = None
    budget: Any = None
    top_logprobs: int | None = None
    priority: int = 0
    traffic: Traffic = Traffic.STANDARD
    drafts: Sequence[int] = ()
    confidences: bool = False
    hold: bool = False
    after: int | None = None
    arrival: float | None = None
    deadline: float | None = None
    seen: tuple[SeenRun, ...] = ()

    def __post_init__(self) -> None:
        ids = _whole_numbers("prompt_ids", self.prompt_ids)
        if not ids:
            raise DeliberateError("prompt_ids is empty: a request needs at least one token")
        object.__setattr__(self, "prompt_ids", ids)
        object.__setattr__(self, "drafts", _whole_numbers("drafts", self.drafts))
        if not (self.later_ends is None or isinstance(self.later_ends, LaterEnds)):
            raise DeliberateError(f"later_ends={self.later_ends!r:.60} is no LaterEnds")
        if self.end_tokens is not None:
            ends = frozenset(_whole_numbers("end_tokens", self.end_tokens))
            object.__setattr__(self, "end_tokens", ends)
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise DeliberateError(
                f"max_new_tokens {self.max_new_tokens!r} must be a whole number of at least 1"
            )
        if self.top_logprobs is not None and not (
            type(self.top_logprobs) is int and self.top_logprobs >= 0
        ):
            raise DeliberateError(
                f"top_logprobs {self.top_logprobs!r} must be a whole number from 0, or None"
            )
        if self.after is not None and type(self.after) is not int:
            raise DeliberateError(f"after={self.after!r} must be the number of a request, or None")
        for name in ("confidences", "hold"):
            if type(getattr(self, name)) is not bool:
                raise DeliberateError(f"{name}={getattr(self, name)!r} must be True or False")
        if type(self.priority) is not int:
            raise DeliberateError(f"priority {self.priority!r} must be a whole number")
        for name, kind in (("spec", DecodingSpec), ("sampling", TokenChooser)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name == "sampling"):
                raise DeliberateError(f"{name}={value!r:.60} is not a {kind.__name__}")
        for name in ("arrival", "deadline"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and math.isfinite(value)):
                raise DeliberateError(f"{name} {value!r} must be a number of seconds, or None")
        lacking = [name for name in _CONSTRAINT if not hasattr(self.constraint, name)]
        if self.constraint is not None and lacking:
            raise DeliberateError(
                f"constraint={self.constraint!r:.60} has no {lacking[0]}: a LogitConstraint is "
                f"needed, with {', '.join(_CONSTRAINT)}"
            )
        if self.watch is not None and self.watch.config != self.spec.long_text:
            raise DeliberateError(
                f"watch with the settings {self.watch.config} in a request with "
                f"long_text={self.spec.long_text}: give the spec the watch's own settings"
            )
        if self.stop is not None and not callable(self.stop):
            raise DeliberateError(f"stop={self.stop!r:.60} cannot be called: give a function")


@dataclass(frozen=True, eq=False)
class BatchRow:
    """What a request is where it is one row of a generation.

    Attributes:
        place: among the rows, by which the chooser and the exit policy know it.
        prefix: ids that logits processors see before the generated ones; it may begin with padding.
        policy_run: of the exit policy that all rows share, and which their front begins and ends.
        cache_row: of the engine's cache, where it holds the beginning of the prompt already.
    """

    place: int
    prefix: list[int]
    policy_run: PolicyRun
    cache_row: int | None = None


@dataclass(frozen=True, eq=False)
class Decoding:
    """How one request is decoded, once what its spec leaves to the model has been filled in.

    Attributes:
        settings: of the decode loop.
        planner: exact mode: shared by the requests of a model; None evaluates all exits always.
        exit_policy: decides which tokens exit; of this request alone. None: by the thresholds of
            the settings.
        drafts: exact mode without exits: proposes them; of this request alone.
        gate_threshold: of the model's deliberation gate, where it is decoded with it; else None.
        seconds: from its arrival on by which it should be finished; None for no such time.
        batch_row: of a generation, whose planner and exit policy were made for its number of rows;
            None: those are told how many sequences run.
    """

    settings: LoopSettings
    planner: DraftPlanner | None = None
    exit_policy: ExitPolicy | None = None
    drafts: DraftSource | None = None
    gate_threshold: float | None = None
    seconds: float | None = None
    batch_row: BatchRow | None = None

    @property
    def of_request_alone(self) -> bool:
        """Whether it has a part that no other request may share."""
        own = (self.exit_policy, self.drafts, self.seconds, self.batch_row)
        return any(one is not None for one in own)


def watch_of(request: Request, settings: LoopSettings) -> LongTextWatch | None:
    """The watch over a request's text: its own, or a new one where its settings have one."""
    if request.watch is not None or settings.long_text is None:
        return request.watch
    return LongTextWatch(settings.long_text)


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Collection):
        raise DeliberateError(f"{name}={values!r:.60}: token ids are needed")
    for value in values:
        if type(value) is not int or value < 0:
            raise DeliberateError(f"{name} has {value!r:.60}: a token id is a whole number from 0")
    return tuple(values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
