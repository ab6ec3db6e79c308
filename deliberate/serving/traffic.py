"""Which of a server's requests are kept as traffic for `deliberate evolve`."""

from __future__ import annotations

import logging
import sqlite3

from deliberate.config import Fidelity
from deliberate.engine.request import Request
from deliberate.lifecycle.traffic import Exchange, TrafficLog
from deliberate.serving.canary import judged
from deliberate.serving.served_version import Ended
from deliberate.trace import GenerationTrace

logger = logging.getLogger(__name__)


def keeper(log: TrafficLog) -> Ended:
    """Keeps greedy requests without processors and constraints, in the engine's thread."""

    def ended(request: Request, trace: GenerationTrace | None, seconds: float) -> None:
        if trace is None or not judged(request):
            return
        dense = request.spec.fidelity in (Fidelity.DENSE, Fidelity.EXACT)
        prompt, answer = tuple(request.prompt_ids), tuple(trace.tokens)
        try:
            log.note(Exchange(prompt, answer, request.max_new_tokens, dense))
        except sqlite3.Error as error:  # a full disk, say: no reason to fail a request
            logger.warning("an exchange was not kept: %s", error)

    return ended
