"""Records chains with probes at every place where a rule may look, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.recorded_chains import (
    ChainCosts,
    ProbePlaces,
    RecordedChain,
    RecordedProbe,
)
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Action, Continue, Probe, Quiet, Trial
from deliberate.reasoning.trial_answers import ends_in, last_ids, word_tokens
from deliberate.utils.errors import DeliberateError

Encode = Callable[[str], Sequence[int]]
AnswerOf = Callable[[str], str]


class RecordProbes:
    """Probes a chain at all places and never stops it; of one chain.

    Args:
        places: where.
        encode: ids of a text, without special tokens.
    """

    def __init__(self, places: ProbePlaces, encode: Encode) -> None:
        self.places = places
        ends = {tuple(encode(text)) for text in places.boundaries} - {()}
        switches = word_tokens(places.switches, encode) if places.switches else set()
        self._ends = sorted(ends | switches)

    def due(self, tokens: Sequence[int]) -> bool:
        """At every chunk, boundary and switch word."""
        if not tokens:
            return False
        return len(tokens) % self.places.chunk == 0 or ends_in(tokens, self._ends)

    def on_step(self, tokens: Sequence[int]) -> Action:
        """A probe."""
        return Probe(self.places.answer_tokens)

    def on_probe(self, trial: Trial) -> Action:
        """The chain goes on."""
        return Continue()


class SpacedProbes(RecordProbes):
    """Probes a chain as rules do, to measure what that costs: at the ends of lines, and at least
    `places.chunk` tokens apart. It never stops it; of one chain.

    Args:
        places: without boundaries and switch words at any token.
        encode: ids of a text, without special tokens.
    """

    def __init__(self, places: ProbePlaces, encode: Encode) -> None:
        super().__init__(places, encode)
        self._last = 0

    def due(self, tokens: Sequence[int]) -> bool:
        """At the first end of a line that is far enough from the last probe."""
        if len(tokens) - self._last < self.places.chunk:
            return False
        return not self._ends or ends_in(tokens, self._ends)

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """As long as the last probe is near, then until the end of a line."""
        count = max(0, self.places.chunk - 1 - (len(tokens) - self._last))
        return Quiet(count, last_ids(self._ends)) if self._ends else Quiet.for_tokens(count)

    def on_step(self, tokens: Sequence[int]) -> Action:
        """A probe."""
        self._last = len(tokens)
        return super().on_step(tokens)


def recorded(
    name: str,
    result: ChainResult,
    reasoning: Sequence[int],
    answer_of: AnswerOf,
    *,
    expected: str | None = None,
    sample: int = 0,
) -> RecordedChain:
    """The record of a chain that was probed by `RecordProbes`.

    Args:
        name: of the problem.
        result: the finished chain.
        reasoning: its ids between the tags.
        answer_of: the final answer in the text of an answer; empty: none.
        expected: the reference answer.
        sample: number of the chain among those of its problem.
    """
    probes = {
        probe.at: RecordedProbe(probe.at, answer_of(probe.answer), probe.confidence, probe.tokens)
        for probe in result.probes
    }
    return RecordedChain(
        name,
        answer_of(result.answer),
        expected,
        tuple(reasoning),
        answer_tokens=len(result.tokens) - len(reasoning),
        sample=sample,
        confidence=probes[max(probes)].confidence if probes else 0.0,
        finished=result.finished,
        probes=tuple(probes[at] for at in sorted(probes)),
    )


def measure_costs(
    runner: ChainRunner,
    requests: Sequence[Callable[[], ChainRequest]],
    places: ProbePlaces,
    encode: Encode,
    clock: Callable[[], float] = time.process_time,
) -> ChainCosts:
    """What a token and a probe cost, from chains that run alone, without and with probes.

    The probes are as far apart as a rule's: between them a chain is decoded in runs. Where the
    first chain has no line that ends they are at any token.

    Args:
        runner: runs nothing else meanwhile.
        requests: each makes the request of one chain; the first one warms up.
        places: of the probes.
        encode: ids of a text.
        clock: seconds.

    Raises:
        DeliberateError: fewer than two requests, or chains without a probe.
    """
    if len(requests) < 2:
        raise DeliberateError(f"{len(requests)} chains to measure costs on: give at least 2")
    plain, tokens, probed, probes, answers = 0.0, 0, 0.0, 0, 0
    for number, make in enumerate(requests):
        request = replace(make(), policy=None)
        began = clock()
        (without,) = runner.run([request])
        middle = clock()
        (with_,) = runner.run([replace(request, policy=SpacedProbes(places, encode))])
        ended = clock()
        if number == 0:
            if not with_.probes:  # a model that ends no line is probed at any token
                places = replace(places, boundaries=(), switches=())
            continue
        plain, tokens = plain + middle - began, tokens + len(without.tokens)
        probed, probes = probed + ended - middle, probes + len(with_.probes)
        answers += with_.probe_tokens
    if not probes:
        raise DeliberateError("no chain had a probe: take a smaller chunk")
    token = plain / tokens
    return ChainCosts(token, max(0.0, (probed - plain - answers * token) / probes))
