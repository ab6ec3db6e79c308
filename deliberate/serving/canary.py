"""A candidate version beside the live one: outcomes of both arms, judged and compared as they come.

The quality of an answer is judged against the live version at full depth, in one pass over the
whole of it: the loss is the share of its tokens that the live full-depth model would not have
chosen there. Only greedy answers without processors and constraints are judged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.lifecycle.ab_test import ABTest, Arm, Decision, Outcome, Verdict
from deliberate.serving.served_version import ServedVersion
from deliberate.trace import GenerationTrace

logger = logging.getLogger(__name__)
# Answers that wait to be judged; further ones are not.
_MOST_WAITING = 64


@torch.inference_mode()
def reference_loss(model: AdaptiveModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Share of an answer's tokens that the model's full depth would not have chosen there."""
    if not answer:
        return 0.0
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model.base(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float((logits.argmax(-1) != ids[0, len(prompt) :]).float().mean())


class Canary:
    """Compares two arms until there is a verdict. It belongs to the server's event loop.

    Args:
        candidate: the version that is tried.
        control: another engine of the live version.
        share: of requests that each of the two gets.
        test: counts.
        decided: called once, with a verdict other than to continue.
        changed: called after outcomes were counted.
    """

    def __init__(
        self,
        candidate: ServedVersion,
        control: ServedVersion,
        share: float,
        test: ABTest,
        decided: Callable[[Verdict], None],
        changed: Callable[[], None],
    ) -> None:
        self.candidate, self.control, self.share = candidate, control, share
        self.test = test
        self._decided: Callable[[Verdict], None] | None = decided
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._judge = ThreadPoolExecutor(1, "judge")
        self._waiting = 0
        for arm, version in ((Arm.CANDIDATE, candidate), (Arm.CONTROL, control)):
            version.on_end = self._hook(arm)

    def close(self) -> None:
        """Counts nothing any more."""
        self._decided = None
        self.candidate.on_end = self.control.on_end = None
        self._judge.shutdown(wait=False, cancel_futures=True)

    def replace_control(self, version: ServedVersion) -> None:
        """A new engine takes the control's place."""
        self.control.on_end = None
        self.control = version
        version.on_end = self._hook(Arm.CONTROL)

    def pick(self, draw: float) -> ServedVersion | None:
        """The arm of a request, by a uniform draw from [0, 1); None for neither."""
        if draw < self.share:
            return self.candidate
        return self.control if draw < 2 * self.share else None

    def decide(self, verdict: Verdict) -> None:
        """Ends the comparison with this verdict, where it has not ended."""
        decided, self._decided = self._decided, None
        if decided is not None:
            decided(verdict)

    def _hook(self, arm: Arm) -> Callable[[Request, GenerationTrace | None, float], None]:
        def ended(request: Request, trace: GenerationTrace | None, seconds: float) -> None:
            """In the engine's thread."""
            self._loop.call_soon_threadsafe(self._note, arm, request, trace, seconds)

        return ended

    def _note(
        self, arm: Arm, request: Request, trace: GenerationTrace | None, seconds: float
    ) -> None:
        if self._decided is None:
            return
        tokens = [] if trace is None else trace.tokens
        each = seconds / len(tokens) if tokens else None
        self._count(self.test.note(arm, Outcome(trace is None, each)))
        if tokens and judged(request) and self._waiting < _MOST_WAITING:
            self._waiting += 1
            work = self._judge.submit(
                reference_loss, self.control.model, list(request.prompt_ids), tokens
            )
            work.add_done_callback(
                lambda done: self._loop.call_soon_threadsafe(self._note_loss, arm, done)
            )

    def _note_loss(self, arm: Arm, done: Any) -> None:
        self._waiting -= 1
        if self._decided is None or done.cancelled():
            return
        if done.exception() is not None:
            logger.warning("an answer could not be judged: %s", done.exception())
            return
        self._count(self.test.note_loss(arm, done.result()))

    def _count(self, verdict: Verdict) -> None:
        self._changed()
        if verdict.decision is not Decision.CONTINUE:
            self.decide(verdict)


def judged(request: Request) -> bool:
    """Whether full depth's most likely tokens are what an answer is to be compared with."""
    plain = request.sampling is None or request.sampling.plain
    # Ids of images are of one process, and of one set of weights.
    return plain and request.constraint is None and not request.seen
