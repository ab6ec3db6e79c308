"""What one generation is asked for: one frozen object that all parts of the decode loop read."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from deliberate.config import Fidelity, KVMode, KVStorage
from deliberate.engine.exit_policy import check_thresholds
from deliberate.engine.long_text import LongTextConfig
from deliberate.engine.scheduler import DeepSchedule
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class LoopSettings:
    """Settings of one generation of a batch.

    Attributes:
        exits: number of layers below each exit, ascending; ignored by dense decoding.
        thresholds: least confidence to exit early, one per exit; an exit policy replaces them.
        fidelity: ``dense``, ``exact`` or ``threshold`` (``certified`` and ``budget`` are threshold
            decoding with an exit policy).
        max_pending: most tokens of a sequence that may be pending above an exit.
        max_new_tokens: length of the output, at least 1.
        end_tokens: ids that end the output.
        kv_mode: what the layers that a token skips get of it; ``exact`` needs ``defer``.
        schedule: when deep passes are run in a batch.
        keep_scores: keep the processed scores of every token.
        long_text: re-weighs the logits at full depth where a text repeats itself; None: never.
        strict: exact mode of one sequence: gap in logits up to which dense's own passes choose a
            token, NaN for the default bound, None for off; see `deliberate.engine.strict`.
        lookup_tokens: exact mode of one sequence without exits: most drafts of a pass that are
            looked up in the text so far (`NgramDrafts`); 0 for none.
        kv_storage: in which form keys and values are kept.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    exits: Sequence[int]
    thresholds: Sequence[float]
    fidelity: Fidelity
    max_pending: int
    max_new_tokens: int
    end_tokens: Collection[int] = ()
    kv_mode: KVMode = KVMode.DEFER
    schedule: DeepSchedule = field(default_factory=DeepSchedule)
    keep_scores: bool = False
    long_text: LongTextConfig | None = None
    strict: float | None = None
    lookup_tokens: int = 0
    kv_storage: KVStorage = KVStorage.NATIVE
    exact: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.fidelity not in (Fidelity.DENSE, Fidelity.EXACT, Fidelity.THRESHOLD):
            raise DeliberateError(
                f"fidelity {str(self.fidelity)!r} in the decode loop: use 'dense', 'exact', or "
                "'threshold' with an exit policy"
            )
        for name in ("max_pending", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise DeliberateError(f"{name} {getattr(self, name)}: it must be at least 1")
        if len(self.thresholds) != len(self.exits):
            raise DeliberateError(
                f"{len(self.thresholds)} thresholds for {len(self.exits)} exits: give one per exit"
            )
        if self.fidelity is Fidelity.EXACT and self.kv_mode is not KVMode.DEFER:
            raise DeliberateError(
                f"kv_mode {str(self.kv_mode)!r} with fidelity 'exact': use 'defer', the others "
                "change the output"
            )
        if self.lookup_tokens < 0:
            raise DeliberateError(f"lookup_tokens {self.lookup_tokens}: it must be 0 or more")
        if self.lookup_tokens and (self.fidelity is not Fidelity.EXACT or self.exits):
            raise DeliberateError(
                f"lookup_tokens {self.lookup_tokens} with fidelity {str(self.fidelity)!r} and "
                f"exits {list(self.exits)}: looked-up drafts are for exact mode without exits"
            )
        dense = self.fidelity is Fidelity.DENSE
        thresholds = () if dense else check_thresholds(self.thresholds)
        object.__setattr__(self, "exits", () if dense else tuple(self.exits))
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "end_tokens", frozenset(self.end_tokens))
        object.__setattr__(self, "exact", self.fidelity is Fidelity.EXACT)


class Stopwatch:
    """Reads the clock of a generation.

    Args:
        clock: seconds, monotonic.
        on_cpu: the layers run on the processor.

    Attributes:
        work: seconds by which ways to decode are compared. On a CPU they are this thread's
            processor time, unless the caller has a clock of its own: a machine that is shared
            stalls a thread for longer than a pass takes, and a few long passes would seem dearer
            than many short ones.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, *, on_cpu: bool = False
    ) -> None:
        self.clock = clock
        self.work = time.thread_time if on_cpu and clock is time.perf_counter else clock
        self.began = 0.0

    def start(self) -> None:
        """The generation begins now."""
        self.began = self.clock()

    def seconds(self) -> float:
        """Seconds since the generation began."""
        return self.clock() - self.began
