"""What a mode answered to one problem, as it is recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_records import ADDED


@dataclass(frozen=True)
class BudgetOutcome:
    """One answer against its latency budget.

    Attributes:
        met: the controller's account: from the decode loop's start to the last token.
        met_whole: the wall clock of the whole call of `generate`.
        allowed_seconds: for an answer of this many tokens.
        expected_disagreement: share of its tokens expected to differ from full depth, by the
            calibrated probability of each at its exit.
        guarded: steps at which the hard guard held.
        speed: the machine against the cost model at the end; above 1 is slower.
    """

    met: bool
    met_whole: bool
    allowed_seconds: float
    expected_disagreement: float
    guarded: int
    speed: float


# Modes whose early tokens are always drafts. `certified` and `budget` verify theirs where exact
# mode decodes for them; in every other mode a token that exits early is accepted.
VERIFYING = ("exact",)


@dataclass(frozen=True)
class ModeOutcome:
    """One mode's answer to one problem.

    `tokens` are the generated ids with the end token where one was produced; `pieces` are the
    same tokens decoded one by one. The prompt pass yields the first token, so a decode of n
    tokens makes n - 1 steps, and these are what `layer_passes` and `layer_positions` count.

    Attributes:
        exit_layers: layer each token was chosen at (`num_layers` = full depth); may be empty for
            a mode that does not report it.
        confidences: confidence of each token where it was chosen; may be empty likewise.
        seconds: wall clock of prompt pass and decoding.
        prefill_seconds: the part of it until the first token.
        layer_passes: calls of a layer after the prompt pass, summed over layers; 0 = not counted.
        layer_positions: positions processed, summed over those calls.
        drafted: exact mode: tokens drafted at an exit; 0 in modes that verify nothing.
        rejected: exact mode: drafts that the full depth rejected.
        finish: "stop" (end token) or "length" (cut off).
        budget: budget mode: the answer against it.
        rounds: of the deliberation gate over each token; None where no gate was on.
        strict: correct behind the task's mark (``####``, a box); `correct` is by the task's style.
        flexible: correct wherever in the text the final answer is found.
        joules: taken by the whole machine meanwhile, as `EnergyMeter` counts; None: not counted.
    """

    text: str
    predicted: str | None
    correct: bool
    tokens: list[int]
    pieces: list[str]
    exit_layers: list[int]
    confidences: list[float]
    seconds: float
    prefill_seconds: float
    layer_passes: int
    layer_positions: int
    drafted: int = 0
    rejected: int = 0
    finish: str = "stop"
    budget: BudgetOutcome | None = field(default=None, metadata=ADDED)
    rounds: list[int] | None = field(default=None, metadata=ADDED)
    strict: bool | None = field(default=None, metadata=ADDED)
    flexible: bool | None = field(default=None, metadata=ADDED)
    joules: float | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if len(self.pieces) != count:
            raise DeliberateError(f"pieces has {len(self.pieces)} entries for {count} tokens")
        for name in ("exit_layers", "confidences"):
            if len(getattr(self, name)) not in (0, count):
                raise DeliberateError(
                    f"{name} has {len(getattr(self, name))} entries for {count} tokens"
                )
        if self.rounds is not None and (
            len(self.rounds) != count or min(self.rounds, default=0) < 0
        ):
            raise DeliberateError(
                f"rounds has {len(self.rounds)} entries for {count} tokens, or one below 0"
            )
        if not (0 <= self.prefill_seconds <= self.seconds and 0 < self.seconds < math.inf):
            raise DeliberateError(
                f"seconds = {self.seconds} and prefill_seconds = {self.prefill_seconds}: "
                "0 <= prefill_seconds <= seconds and 0 < seconds must hold"
            )
        if min(self.layer_passes, self.layer_positions) < 0:
            raise DeliberateError("layer_passes and layer_positions must not be negative")
        if not 0 <= self.rejected <= self.drafted:
            raise DeliberateError(f"rejected = {self.rejected} must be in 0..{self.drafted}")
        if self.finish not in ("stop", "length"):
            raise DeliberateError(f"finish = {self.finish!r} must be 'stop' or 'length'")

    @property
    def steps(self) -> int:
        """Decode steps: tokens after the first, which the prompt pass yields."""
        return max(0, len(self.tokens) - 1)

    def verifies(self, mode: str) -> bool:
        """Whether drafts were verified; older results count some that no pass verified."""
        return mode in VERIFYING or self.rejected > 0

    def exited_early(self, num_layers: int) -> int:
        """Tokens chosen at an exit, of a model with so many layers."""
        return sum(layer < num_layers for layer in self.exit_layers)

    @property
    def ms_per_step(self) -> float:
        """Milliseconds per decode step, the prompt pass left out."""
        return 1000 * (self.seconds - self.prefill_seconds) / max(1, self.steps)

    @property
    def seconds_per_token(self) -> float:
        """Wall clock, prompt pass included, per generated token."""
        return self.seconds / max(1, len(self.tokens))


@dataclass(frozen=True)
class ProblemRecord:
    """One problem and what every mode that ran on it answered."""

    id: str
    question: str
    answer: str
    source: str
    difficulty: int | None
    subject: str | None
    prompt_tokens: int
    modes: dict[str, ModeOutcome]

    def __post_init__(self) -> None:
        if not self.modes:
            raise DeliberateError(f"problem {self.id!r} has no outcome of any mode")


@dataclass(frozen=True)
class Departure:
    """The first token at which two modes differ that guarantee the same output.

    Attributes:
        problem: its id.
        position: of the token in the answer.
        gap: dense's logit of its own token less that of the other mode's; None where it was not
            measured, or one answer ends there.
        steps: the gap in steps of the model's dtype at the largest logit of that position.
        near_tie: rounding can have decided: the gap is within what strict mode runs again, and it
            was not on.
    """

    problem: str
    position: int
    gap: float | None = None
    steps: float | None = None
    near_tie: bool = False


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
