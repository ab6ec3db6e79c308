"""Several full-depth tokens of several sequences in one call, where tokens are sampled or masked.

Per token a step in Python costs more than a small model does. Where a token is the argmax of logits
over a temperature, less noise that depends on the seed alone, and a constraint says for several
tokens what it does to their scores (`SteadyMask`), the executor chooses them: the same tokens. It
leaves out those at which the constraint changes; they are chosen from their logits as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from deliberate.cache.block_cache import BlockCache
from deliberate.config import MAX_CALL_STEPS
from deliberate.engine.constraints import LogitConstraint, SteadyMask
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.verifier import Verifier
from deliberate.kernels.native_sampling import Sampled, SampledRow, ScoreRules
from deliberate.modeling.head_output import HeadOutput

_FREE = SteadyMask(MAX_CALL_STEPS, ScoreRules())
# Of scores that are drawn for in a call of several sequences: beyond, a pass takes so long that a
# step in Python costs nothing beside it, and others would wait for the call.
_MOST_SCORES = 1 << 15


class SampledSteps:
    """Decodes sequences whose tokens are sampled or constrained, several of each in one call.

    Args:
        executor: what `Backbone.multi_step` returned.
        runner: has the layers and the cache, and counts the passes.
        verifier: chooses the tokens that the executor leaves out.
        stopwatch: reads the clock.
    """

    def __init__(
        self, executor: object, runner: SegmentRunner, verifier: Verifier, stopwatch: Stopwatch
    ) -> None:
        self._sample = getattr(executor, "sample_rows", None)
        self._runner = runner
        self._verifier = verifier
        self._stopwatch = stopwatch

    def decode(self, sequences: Sequence[DecodingSequence]) -> bool:
        """Decodes at most `MAX_CALL_STEPS` tokens of each at full depth; whether it did.

        Not where tokens of one of them are to be chosen in another way. A sequence whose constraint
        is about to change takes part in one pass.
        """
        if self._sample is None or not all(one.multi_sample for one in sequences):
            return False
        if self._runner.gate is not None:
            return False
        masks = [_mask(one) for one in sequences]
        if 2 * sum(mask is None for mask in masks) > len(masks) - 1:
            return False
        width, alone = self._runner.backbone.vocab_size, len(sequences) == 1
        most = MAX_CALL_STEPS if alone else min(MAX_CALL_STEPS, _MOST_SCORES // width)
        if most < 2:
            return False
        rows = [
            self._row(sequence, mask, most) for sequence, mask in zip(sequences, masks, strict=True)
        ]
        made = self._sample(rows, self._runner.cache)
        self._count(sequences, rows, made)
        left = [place for place, one in enumerate(made) if not self._accept(sequences[place], one)]
        if left:
            logits = made[left[0]].logits[None]
            if len(left) > 1:
                logits = logits.new_empty((len(left), width))
                for row, place in enumerate(left):
                    logits[row] = made[place].logits
            self._verifier.choose([sequences[place] for place in left], HeadOutput(logits))
        return True

    def _row(self, sequence: DecodingSequence, mask: SteadyMask | None, most: int) -> SampledRow:
        runner, made, settings = self._runner, len(sequence.records), sequence.settings
        start = sequence.position
        held = runner.cache.length(runner.backbone.num_layers - 1, sequence.row)
        if held != start:
            raise RuntimeError(f"token at position {start}: the layers hold {held} tokens")
        if mask is None:
            return SampledRow(
                sequence.row, sequence.records[-1].token, start, 1, _FREE.rules, left_out=True
            )
        steps = min(most, mask.count, settings.max_new_tokens - made)
        if isinstance(runner.cache, BlockCache):
            # No further block than the step's own, which the scheduler has set aside.
            size = runner.cache.block_size
            steps = min(steps, -start % size or size)
        ends, steps = sequence.next_ends(steps)
        chooser, noise, temperature = sequence.chooser, None, 1.0
        if not chooser.plain:
            temperature = chooser.temperature or 1.0
            width = runner.backbone.vocab_size
            noise = chooser.noise(sequence.place, made, steps, width)
        return SampledRow(
            sequence.row,
            sequence.records[-1].token,
            start,
            steps,
            mask.rules,
            tuple(sorted(ends)),
            mask.recent,
            mask.matched,
            noise,
            temperature,
        )

    def _count(
        self,
        sequences: Sequence[DecodingSequence],
        rows: Sequence[SampledRow],
        made: Sequence[Sampled],
    ) -> None:
        """Counts the passes."""
        runner, top = self._runner, len(self._runner.boundaries) - 1
        for number in range(max(one.passes for one in made)):
            own = [place for place, one in enumerate(made) if number < one.passes]
            keys = max(rows[place].start for place in own) + number + 1
            runner.note(0, top, [sequences[place] for place in own], [1] * len(own), keys)

    def _accept(self, sequence: DecodingSequence, made: Sampled) -> bool:
        """Appends what was accepted; whether that is the token of every pass."""
        depth, seconds = self._runner.backbone.num_layers, self._stopwatch.clock()
        for token, top in zip(made.tokens, made.tops, strict=True):
            confidence = top if sequence.confident else float("nan")
            sequence.add(token, depth, confidence, seconds - sequence.began, verified=True)
        sequence.verified = len(sequence.records)
        if sequence.constraint is not None and made.tokens:
            sequence.constraint.passed(sequence.records, made.logprobs)
        whole = len(made.tokens) == made.passes
        if whole:
            sequence.add_forced(seconds - sequence.began, self._runner.backbone.vocab_size)
        return whole


def chosen_freely(sequence: DecodingSequence, constraint: LogitConstraint | None) -> bool:
    """Whether its tokens are more than an argmax, and depend on noise and constraint alone."""
    chooser = sequence.chooser
    if not sequence.processed or sequence.exact or sequence.keeps or sequence.gated:
        return False
    if constraint is not None and not hasattr(constraint, "steady"):
        return False
    alone = sequence.watch is None and sequence.lookup is None and sequence.planner is None
    known = chooser.plain or chooser.temperature is not None
    return alone and known and sequence.settings.strict is None


def _mask(sequence: DecodingSequence) -> SteadyMask | None:
    """What its constraint does to the next tokens; None where each is to be asked for."""
    if sequence.constraint is None:
        return _FREE
    return sequence.constraint.steady(sequence.records)
