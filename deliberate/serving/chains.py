"""Chains of reasoning and votes over HTTP: what a body asks for, run by the model's `Reasoner`.

Probes, votes and rolled back tokens need an engine whose rows they can hold, so a request with
``reasoning`` or ``votes`` gets one of its own, in a thread. A few of them run beside each other, so
that a short one does not wait for the chains of a long vote, and beside the engine of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.api.reasoned import elected
from deliberate.api.reasoner import Reasoner
from deliberate.engine.sampler import TokenChooser
from deliberate.eval.grading.equality import same_value
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.settings import ReasoningSettings, VoteGroup
from deliberate.reasoning.vote_runner import VoteResult, spent_on
from deliberate.serving.answers import Answer, Body, Choice
from deliberate.serving.errors import ApiError
from deliberate.serving.reasoning import asked
from deliberate.serving.requests import RequestBuilder, chooser, now, spec_of
from deliberate.serving.text import TokenText
from deliberate.utils.errors import DeliberateError

# Chains of a vote at most, and chains that are decoded at a time.
MOST_VOTES = 64
_RUNNING = 8
# Such requests that run at a time. They share the interpreter, so more would only hold more memory.
_AT_ONCE = 4
# Apart by more than an output has tokens, so that no two stretches of chains share a seed.
_SEEDS_APART = 1_000_003
_REFUSED = {
    "stop": "a chain ends by its policy, its tags and its limits",
    "latency_budget": "a chain has no latency budget: limit its tokens with thinking_token_budget",
    "deadline_ms": "how long probes and votes take is not predicted",
    "service_tier": "chains run in the order in which they come",
    "structured": "the form would be that of the probes too",
    "alternatives": "chains keep no log-probabilities",
    "callable_tools": "a probe's answer is no call",
}
_NAMES = {"structured": "response_format", "alternatives": "logprobs", "callable_tools": "tools"}


class GivenUp(Exception):
    """Nobody reads the answer any more, or its time is over."""


@dataclass(frozen=True)
class ChainsAsked:
    """Chains that a body asks for.

    Attributes:
        settings: of the reasoning, the body's limit of its tokens included.
        votes: None: one chain for each of the `n` choices.
    """

    settings: ReasoningSettings
    votes: VoteGroup | None

    @property
    def most(self) -> int:
        """Chains of one choice at most."""
        return 1 if self.votes is None else self.votes.rule.most


def has_chains(body: Body) -> bool:
    """Whether a body has ``reasoning`` or ``votes``."""
    return body.reasoning is not None or body.votes is not None


def chains_asked(
    body: Body, limit: int, tags: tuple[str, str] | None, default: int | None
) -> ChainsAsked:
    """What a body with ``reasoning`` or ``votes`` asks for.

    Args:
        body: its fidelity filled in.
        limit: tokens of an output.
        tags: of the server; None: the model's own.
        default: the server's limit of tokens of reasoning, or None.

    Raises:
        ApiError: 400 for what cannot be enforced, by the name of its field.
    """
    called = "reasoning" if body.votes is None else "votes"
    for name, reason in _REFUSED.items():
        if getattr(body, name, None) not in (None, [], "auto", "default"):
            raise ApiError(400, f"{_NAMES.get(name, name)} with {called}: {reason}; leave it out")
    if body.priority:
        raise ApiError(400, f"priority with {called}: chains run in the order in which they come")
    if body.stream_options is not None and body.stream_options.include_depth:
        raise ApiError(400, f"stream_options.include_depth with {called}: leave it out")
    if body.fidelity in ("certified", "budget"):
        raise ApiError(
            400,
            f"fidelity {body.fidelity} with {called}: its calibration is of whole outputs; use "
            "dense, exact or threshold",
        )
    if body.votes is not None and body.n > 1:
        raise ApiError(400, f"n={body.n} with votes: a vote has one answer; leave n out")
    if body.votes is not None and not body.temperature:
        raise ApiError(400, "votes with temperature=0: greedy chains are all the same")
    try:
        return ChainsAsked(_settings(body, limit, tags, default), _votes(body.votes))
    except DeliberateError as error:
        raise ApiError(400, str(error)) from None


def _settings(
    body: Body, limit: int, tags: tuple[str, str] | None, default: int | None
) -> ReasoningSettings:
    given: Any = "none" if body.reasoning is None else body.reasoning
    own = {given: None} if isinstance(given, str) and given != "none" else given
    own = {} if isinstance(own, str) else dict(own)
    for name in ("tags", "lead_in", "same"):
        if name in own:
            raise ApiError(400, f"reasoning.{name}: it is the server's to say; leave it out")
    wanted = asked(body)
    if wanted is not None and own.get("budget") is not None:
        raise ApiError(400, f"reasoning.budget and {wanted.name} are both given: give one of them")
    if wanted is not None:
        own["budget"] = wanted.budget(limit)
    elif own.get("budget") is None:
        own["budget"] = default
    if tags is not None:
        own["tags"] = tags
    own["same"] = same_value
    return ReasoningSettings.of(own)


def _votes(votes: Any) -> VoteGroup | None:
    if votes is None:
        return None
    group = VoteGroup.of(votes)
    if group.rule.most > MOST_VOTES:
        raise ApiError(400, f"votes: {group.rule.most} chains; {MOST_VOTES} at most here")
    return group


@dataclass
class ChainAnswers:
    """Finished chains of a request.

    Attributes:
        chosen: the chain of each choice.
        vote: None without one.
    """

    chosen: list[ChainResult]
    vote: VoteResult | None = None

    def facts(self) -> dict[str, Any]:
        """What the response says of them, JSON-ready."""
        made: dict[str, Any] = {
            "chains": [
                {
                    "stopped": one.stopped,
                    "gave_up": one.gave_up,
                    "probes": len(one.probes),
                    "probe_tokens": one.probe_tokens,
                    "rolled_back": one.rolled_back,
                    "forks": one.forks,
                    "reweighed": one.reweighed,
                }
                for one in self.chosen
            ]
        }
        if self.vote is not None:
            tally = self.vote.tally
            made["votes"] = {
                "answers": list(tally.answers),
                "counts": list(tally.counts),
                "weights": list(tally.weights),
                "chains": len(self.vote.chains),
                "tokens": self.vote.tokens,
            }
        return made


class ChainFeed:
    """Tokens of running chains, from the thread that decodes them to the loop that made this.

    Args:
        choices: of the request.
    """

    def __init__(self, choices: int) -> None:
        self.fresh = [asyncio.Queue[Sequence[int]]() for _ in range(choices)]
        self._told = [0] * choices
        self._loop = asyncio.get_running_loop()

    def hear(self, choice: int, output: Sequence[int]) -> None:
        """A chain's output so far, in its thread; no token is rolled back later."""
        fresh = tuple(output[self._told[choice] :])
        self._told[choice] = len(output)
        if fresh:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.fresh[choice].put_nowait, fresh)


class Chains:
    """Runs the chains of one version's model.

    Args:
        model: of the version.
        builder: of it.
    """

    def __init__(self, model: Any, builder: RequestBuilder) -> None:
        self._model = model
        self._builder = builder
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    async def run(
        self,
        body: Body,
        prompt: list[int],
        limit: int,
        wanted: ChainsAsked,
        until: float,
        most: int,
        feed: ChainFeed,
    ) -> ChainAnswers:
        """The finished chains of a request.

        Args:
            body: its fidelity filled in.
            prompt: token ids.
            limit: tokens of each output.
            wanted: of `chains_asked`.
            until: second of the engine's clock at which it is given up.
            most: requests that may wait for their turn.
            feed: told of the outputs of chains as they grow, where nothing of them can be
                rolled back and there is no vote.

        Raises:
            ApiError: too many wait, the model cannot do it, or the time is over.
        """
        if self._waiting > most:
            raise ApiError(
                429,
                f"{self._waiting} requests with chains wait already: try again later",
                "overloaded_error",
                retry_after=1,
            )
        gone: list[bool] = []

        def check() -> None:
            if gone or now() > until:
                raise GivenUp

        self._waiting += 1
        try:
            async with self._turns:
                work = asyncio.to_thread(self._run, body, prompt, limit, wanted, check, feed)
                task = asyncio.create_task(work)
                # Nobody waits for what a thread raises whose request was cancelled.
                task.add_done_callback(lambda one: one.cancelled() or one.exception())
                return await asyncio.shield(task)
        except GivenUp:
            raise ApiError(503, "the chains took too long: allow fewer tokens", "timeout") from None
        except DeliberateError as error:
            raise ApiError(400, str(error)) from None
        finally:
            self._waiting -= 1
            gone.append(True)  # of a request that was cancelled the thread ends at its next step

    def _run(
        self,
        body: Body,
        prompt: list[int],
        limit: int,
        wanted: ChainsAsked,
        check: Callable[[], None],
        feed: ChainFeed,
    ) -> ChainAnswers:
        seed = self._builder.seed_of(body)

        def sampling(chain: int, start: int) -> TokenChooser:
            return chooser(body, seed + _SEEDS_APART * chain + start)

        spec = spec_of(body)
        reasoner = Reasoner(
            self._model,
            self._builder.tokenizer,
            wanted.settings,
            end_tokens=self._builder.end_tokens,
            longest=len(prompt) + limit + 32,
            running=min(_RUNNING, max(2, body.n, wanted.most)),
            check=check,
        )
        if wanted.votes is None:
            drawn = sampling if body.temperature > 0 else None
            heard = {} if "rollback" in wanted.settings.policies else {"heard": feed.hear}
            prompts = [prompt] * body.n
            return ChainAnswers(reasoner.run(prompts, limit, spec=spec, sampling=drawn, **heard))
        vote = reasoner.vote(prompt, limit, wanted.votes, sampling, spec=spec)
        return ChainAnswers([elected(vote)], vote)


class ChainSource:
    """A choice of chains, as the server reads choices that are decoded token by token.

    Args:
        index: of the choice.
        work: the finished chains of all choices.
        feed: their tokens meanwhile.
        answer: the response it belongs to; told of the chains.
        prompt: token ids.
        builder: reads outputs.
    """

    def __init__(
        self,
        index: int,
        work: asyncio.Task[ChainAnswers],
        feed: ChainFeed,
        answer: Answer,
        prompt: list[int],
        builder: RequestBuilder,
    ) -> None:
        self.index, self.done, self.finish = index, False, "length"
        self._work, self._fresh, self._answer = work, feed.fresh[index], answer
        self._text = builder.reasoning.text(prompt, (), chat=answer.chat)
        self._made: list[TokenText] = []
        self._read = 0
        self._choice = Choice(index, "", "length", 0, None)

    async def more(self) -> list[TokenText]:
        """The text of what has come since; the rest once the chains are finished.

        Raises:
            ApiError: as `Chains.run`.
        """
        coming = asyncio.create_task(self._fresh.get())
        try:
            await asyncio.wait((coming, self._work), return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return self._said(coming.result())
        finally:
            coming.cancel()
        answers = await self._work
        self._answer.chains = answers.facts()
        chain = answers.chosen[self.index]
        made = self._said(chain.tokens[self._read :])
        if rest := self._text.finish():
            made.append(TokenText(rest, 0, reasoning=self._text.is_reasoning))
            self._made.append(made[-1])
        self.done, self.finish = True, "stop" if chain.finished else "length"
        spent = [chain] if answers.vote is None else answers.vote.chains
        self._choice = Choice(
            self.index,
            "".join(one.text for one in self._made if not one.reasoning),
            self.finish,
            sum(map(spent_on, spent)),
            None,
            reasoning="".join(one.text for one in self._made if one.reasoning) or None,
            reasoning_tokens=chain.reasoning_tokens,
        )
        return made

    def _said(self, tokens: Sequence[int]) -> list[TokenText]:
        made: list[TokenText] = []
        for token in tokens:
            said = self._text.push(token)
            made.append(TokenText(said, 0, reasoning=self._text.is_reasoning))
        self._read += len(tokens)
        self._made += made
        return made

    def choice(self) -> Choice:
        """What it has come to."""
        return self._choice

    def close(self) -> None:
        """Nobody reads it any more."""
        self._work.cancel()
