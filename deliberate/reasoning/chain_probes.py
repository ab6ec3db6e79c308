"""Probes of chains: forks that are made to answer, along a chain or at all places of it at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from deliberate.config import Fidelity
from deliberate.engine.admitted import StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_output import ChainTokens, ProbeRecord
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.stop_policy import Trial
from deliberate.reasoning.trial_answers import trial_confidence

# Drafts of an answer that are taken from the chain.
_DRAFTS = 4
Decode = Callable[[Sequence[int]], str]
Due = Callable[[Sequence[int]], bool]


class Prober:
    """Probes as requests of an engine, and what they answered.

    Args:
        engine: decodes them.
        marks: `ReasoningMarks.rest` is put before an answer.
        decode: text of token ids.
        end_tokens: that end an answer; the end of a line does too.
        spec: how they are decoded.
    """

    def __init__(
        self,
        engine: Engine,
        marks: ReasoningMarks,
        decode: Decode,
        end_tokens: Collection[int],
        spec: DecodingSpec,
    ) -> None:
        self._engine = engine
        self._marks = marks
        self._decode = decode
        self._end_tokens = frozenset(end_tokens)
        self._spec = spec
        self._drafts = spec.fidelity is Fidelity.DENSE

    def _expected(self, output: Sequence[int], answered: Sequence[int]) -> list[int]:
        """What a probe is likely to answer: what the one before it did, else what followed in the
        chain when the last token before an answer was last seen there."""
        if answered:
            return [token for token in answered if token not in self._end_tokens]
        before = self._marks.handover[-1]
        for place in range(len(output) - 2, -1, -1):
            if output[place] == before:
                return list(output[place + 1 : place + 1 + _DRAFTS])
        return []

    def request(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        most: int,
        *,
        after: int | None = None,
        hold: bool = False,
        answered: Sequence[int] = (),
    ) -> Request:
        """The request of a probe.

        Args:
            prompt: of the chain.
            output: of the chain so far.
            most: tokens of the answer at most.
            after, hold: of the request.
            answered: what the probe before it answered; tried as drafts.
        """

        def stop(made: Sequence[int]) -> bool:
            text = self._decode(made)
            return bool(text.strip()) and text.endswith("\n")

        return Request(
            [*prompt, *output, *self._marks.rest(output)],
            most,
            self._spec,
            end_tokens=self._end_tokens,
            stop=stop,
            drafts=self._expected(output, answered) if self._drafts else (),
            confidences=True,
            hold=hold,
            after=after,
        )

    def answered(self, at: int, made: Sequence[int], last: StepOutput) -> tuple[Trial, ProbeRecord]:
        """What a probe after `at` tokens of reasoning answered by these tokens.

        Args:
            last: output of its request, with which it ended.
        """
        own = [token for token in made if token not in self._end_tokens]
        assert last.trace is not None  # it has ended
        probabilities = tuple(record.confidence for record in last.trace.records[: len(own)])
        trial = Trial(self._decode(own).strip(), tuple(own), probabilities)
        confidence = trial_confidence(probabilities)
        return trial, ProbeRecord(at, trial.text, confidence, len(made))

    def probes_of(
        self,
        chains: Sequence[tuple[Sequence[int], Sequence[int]]],
        due: Due,
        most: int,
        in_flight: int,
    ) -> list[list[ProbeRecord]]:
        """Probes finished chains at every place where `due` says so; many of them share passes.

        Args:
            chains: prompt and output of each.
            due: after these tokens of reasoning.
            most: tokens of an answer at most.
            in_flight: probes that run at a time.

        Returns:
            Of each chain, in the order of their places: what a policy that probes there while the
            chain is decoded gets.
        """
        found: list[list[ProbeRecord]] = [[] for _ in chains]
        running: dict[int, tuple[int, int, list[int]]] = {}
        waiting = self._places(chains, due)
        while True:
            while len(running) < in_flight and (place := next(waiting, None)) is not None:
                number, at, output = place
                request = self.request(chains[number][0], output, most)
                running[self._engine.add(request)] = (number, at, [])
            if not running:
                break
            for step in self._engine.step():
                if step.id not in running:
                    continue
                number, at, made = running[step.id]
                made += step.tokens
                if step.finished is not None:
                    del running[step.id]
                    found[number].append(self.answered(at, made, step)[1])
        return [sorted(one, key=lambda record: record.at) for one in found]

    def _places(
        self, chains: Sequence[tuple[Sequence[int], Sequence[int]]], due: Due
    ) -> Iterator[tuple[int, int, list[int]]]:
        """(chain, tokens of reasoning, output up to there) of every place."""
        for number, (_, output) in enumerate(chains):
            so_far, whole = (
                ChainTokens(self._marks),
                len(ChainTokens(self._marks, output).reasoning),
            )
            for token in output[:-1]:
                so_far.add(token)
                if so_far.reasons and len(so_far.reasoning) <= whole and due(so_far.reasoning):
                    yield number, len(so_far.reasoning), list(so_far.output)
