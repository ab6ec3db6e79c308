"""One choice while it is made: its parts as text, its time limit, and what metrics learn of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from deliberate.policies.controller_settings import BudgetReport
from deliberate.serving.answers import Answer, Choice, Depth
from deliberate.serving.errors import ApiError
from deliberate.serving.logprobs import TokenNames
from deliberate.serving.metrics import Metrics
from deliberate.serving.parts import Part, PartStream
from deliberate.serving.reasoning_text import ReasoningText
from deliberate.serving.requests import now
from deliberate.serving.service import EngineDown, EngineFailed, QueueFull
from deliberate.serving.text import AnswerText, TokenText
from deliberate.trace import GenerationTrace
from deliberate.utils.errors import DeliberateError


class TooLate(DeliberateError):
    """A request that has waited so long that its answer would come after its deadline."""


class AnswerStream:
    """The text of one choice as its tokens are accepted.

    Args:
        index: of the choice.
        parts: from the engine.
        text: of the answer.
        answer: the response it belongs to.
        limit: second of the engine's clock at which it ends with what it has.
        metrics: told of its first token and its end.
        ended: called with the tokens and the seconds of an answer that ended by itself, and those
            of them that it spent outside the engine.
        names: of tokens, where log-probabilities are asked for.
        begin_by: second at which it is given up where it has not begun: it would be late.

    Attributes:
        index: of the choice.
        done: nothing follows; `finish` says why.
    """

    def __init__(
        self,
        index: int,
        parts: PartStream,
        text: AnswerText | ReasoningText,
        answer: Answer,
        limit: float,
        metrics: Metrics,
        ended: Callable[[int, float, float | None], None] = lambda *_: None,
        names: TokenNames | None = None,
        *,
        begin_by: float = math.inf,
    ) -> None:
        self.index = index
        self.done = False
        self.finish = "length"
        self._parts = parts
        self._text = text
        self._answer = answer
        # One timer for the whole answer: one for each part costs more than to read the part.
        late = Part([], "length", at=math.nan)
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(max(0.0, limit - now()), parts.put, late)]
        if begin_by < limit:
            self._timers.append(loop.call_later(max(0.0, begin_by - now()), self._check_begun))
        self._metrics = metrics
        self._ended = ended
        self._names = names
        self._made: list[TokenText] = []
        self._trace: GenerationTrace | None = None
        self._budget: BudgetReport | None = None
        self._first: float | None = None
        self._last = 0.0
        self._closed = False
        self._layer = 0
        self._overhead: float | None = None

    async def more(self) -> list[TokenText]:
        """The text of the next part, token by token; may be empty.

        Raises:
            ApiError: the engine refuses the request, or failed.
        """
        try:
            parts = await self._parts.ready()
        except DeliberateError as error:
            self._end("abort" if isinstance(error, TooLate) else "error")
            raise as_api_error(error) from None
        read = now()
        first = next((part for part in parts if part.tokens), None)
        if first is not None and self._first is None:
            self._first = self._last = read
            self._metrics.first_token.observe(read - self._answer.arrival)
            if (outside := self._outside(first, read)) is not None:
                self._metrics.overhead.observe(outside)
        elif first is not None:
            tokens = sum(len(part.tokens) for part in parts)  # they were read together
            before, self._last = self._last, read
            for _ in range(tokens):
                self._metrics.between_tokens.observe((read - before) / tokens)
        made: list[TokenText] = []
        for part in parts:
            self._read(part, made)
            if self.done:
                break
        self._made += made
        return made

    def _read(self, part: Part, made: list[TokenText]) -> None:
        """Adds the text of one part."""
        for place, (token, layer) in enumerate(zip(part.tokens, part.exit_layers, strict=True)):
            if not self._text.stopped:
                offset, entry = self._text.length, None
                if self._names is not None:
                    entry = self._names.entry(token, part.logprobs[place])
                said = self._text.push(token)
                made.append(TokenText(said, layer, offset, entry, self._text.is_reasoning))
                self._layer = layer
        self._trace, self._budget = part.trace, part.budget
        if part.finished is not None and not self._text.stopped:
            rest = self._text.finish()
            if rest:  # held back until now, by the last token
                kind = self._text.is_reasoning
                same = bool(made) and made[-1].reasoning == kind
                last = made.pop() if same else TokenText("", self._layer, reasoning=kind)
                made.append(last._replace(text=last.text + rest))
        if self._text.stopped or part.finished is not None:
            self.finish = "stop" if self._text.stopped else str(part.finished)
            self.done = True
            self._overhead = self._outside(part, now())
            self._end(self.finish)

    def _check_begun(self) -> None:
        if self._first is None and self._parts.silent:
            waited = 1000 * (now() - self._answer.arrival)
            self._parts.put(
                TooLate(
                    f"deadline_ms={self._answer.body.deadline_ms:g}: it has waited for "
                    f"{waited:.0f} ms and would be late: try again later"
                )
            )

    def _outside(self, part: Part, read: float) -> float | None:
        """Seconds from arrival until a part was read that were not the engine's."""
        inside = part.at - self._parts.entered
        return None if math.isnan(inside) else max(0.0, read - self._answer.arrival - inside)

    def choice(self) -> Choice:
        """What it has come to."""
        tokens = self._text.token_count
        depth = Depth.of(self._trace)
        return Choice(
            self.index,
            "".join(one.text for one in self._made if not one.reasoning),
            self.finish,
            tokens,
            depth,
            self._budget,
            None if self._names is None else self._made,
            "".join(one.text for one in self._made if one.reasoning) or None,
            self._text.reasoning_tokens,
        )

    def close(self) -> None:
        """Nobody reads it any more; without waiting."""
        self._end("abort")

    def _end(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        self._timers = []
        self._parts.close()
        self._metrics.note_end(reason, self._trace)
        if reason not in ("stop", "length"):
            return
        end, arrival, tokens = now(), self._answer.arrival, self._text.token_count
        self._ended(tokens, end - arrival, self._overhead)
        self._metrics.whole.observe(end - arrival)
        if self._first is not None and tokens > 1:
            self._metrics.per_token.observe((end - self._first) / (tokens - 1))
        if self._budget is not None:
            met = self._budget.met
            (self._metrics.budgets_kept if met else self._metrics.budgets_missed).inc()
        deadline = self._answer.body.deadline_ms
        if deadline is not None:
            kept = 1000 * (end - arrival) <= deadline
            (self._metrics.deadlines_kept if kept else self._metrics.deadlines_missed).inc()


def as_api_error(error: DeliberateError) -> ApiError:
    """The status that an error of the engine is answered with."""
    if isinstance(error, QueueFull | TooLate):
        return ApiError(429, str(error), "overloaded_error", retry_after=1)
    if isinstance(error, EngineDown):
        return ApiError(503, f"{error}: try again", "overloaded_error", retry_after=1)
    if isinstance(error, EngineFailed):
        return ApiError(500, str(error), "internal_error")
    return ApiError(400, str(error))
