"""One exit policy while it decides: told of steps and work, its thresholds given to sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable

from deliberate.engine.exit_policy import ExitPolicy
from deliberate.engine.sequence import DecodingSequence
from deliberate.trace import BatchTrace


class PolicyRun:
    """An exit policy and the sequences that it decides for.

    They are those of one request, or the rows of one generation, which share a policy.

    Args:
        policy: of these sequences alone.
        exits: of the model.
        work: what the sequences run, where that is known as a whole, as of a generation; None: what
            runs is kept while the policy measures time.

    Attributes:
        changes: its thresholds may change between steps.
        compares: a decision is nothing but a comparison with thresholds that do not change.
        sequences: that it decides for.
    """

    def __init__(self, policy: ExitPolicy, exits: int, work: BatchTrace | None = None) -> None:
        self.policy = policy
        self.changes = not policy.constant
        self.compares = policy.constant and policy.thresholds is not None
        self.sequences: list[DecodingSequence] = []
        self.of_generation = work is not None
        self._work = BatchTrace([]) if work is None else work
        self._exits = exits

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """Before the first pass; see `ExitPolicy.begin`."""
        self.policy.begin(now, prompt_tokens, max_new_tokens, self._work)
        self.changes = not self.policy.constant
        self.compares = self.policy.constant and self.policy.thresholds is not None
        self._give(self.sequences)

    def step(self, now: float, running: int) -> None:
        """The newest tokens of those that are not blocked are fed next.

        Until such a token has been through full depth or has exited its thresholds stay, however
        many steps it waits in between.

        Args:
            running: sequences that share the passes of an engine.
        """
        tokens = max((len(one.records) for one in self.sequences if not one.finished), default=0)
        if not self.changes or not tokens:
            return
        if not self.of_generation:
            self.policy.on_load(running)
        self.policy.on_step(now, tokens)
        self._give(one for one in self.sequences if not one.blocked)

    def note_work(self, step: BatchTrace) -> None:
        """Keeps what a step ran, for whomever, where the policy measures time."""
        if self.changes and not self.of_generation:
            self._work.append(step)

    def end(self, now: float) -> None:
        """All sequences are complete."""
        self.policy.end(now, max(len(one.records) for one in self.sequences))

    def _give(self, sequences: Iterable[DecodingSequence]) -> None:
        """Gives sequences the thresholds, and the gate's where exact mode does not keep dense's."""
        thresholds, gate_threshold = self.policy.thresholds, self.policy.gate_threshold
        given = (-math.inf,) * self._exits if thresholds is None else tuple(thresholds)
        for sequence in sequences:
            if sequence.gated and gate_threshold is not None and not sequence.exact:
                sequence.gate_threshold = gate_threshold
            # Without exits of its own no token of a sequence exits.
            sequence.thresholds = given if sequence.settings.exits else (math.inf,) * self._exits
