"""What of decoding is measured for a cost model: sizes of passes, steps and rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        tokens: tokens per sequence of a pass.
        contexts: tokens cached before it.
        batches: sequences.
        prompts: lengths of prompt passes.
        steps: of the made-up decode, for each context and batch; fewer, but at least 12, where
            three rounds of so many would take more than half of `seconds`.
        rounds: measurements of each step, at most.
        seconds: once this long, no further round is begun after the third.
    """

    tokens: tuple[int, ...] = (1, 2, 4, 8, 12)
    contexts: tuple[int, ...] = (32, 128, 512)
    batches: tuple[int, ...] = (1, 2, 8)
    prompts: tuple[int, ...] = (16, 64, 256)
    steps: int = 48
    rounds: int = 9
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("tokens", "contexts", "batches", "prompts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise DeliberateError(f"{name} {list(values)} of a grid: whole numbers from 1 on")
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise DeliberateError(f"{name} = {getattr(self, name)} must be at least 1")
        if 1 not in self.tokens or 1 not in self.batches or len(self.tokens) < 2:
            raise DeliberateError("a grid needs passes over 1 token of 1 sequence, and larger ones")

    def within(self, max_positions: int | None) -> Grid:
        """The part of the grid that fits a model's context."""
        if max_positions is None:
            return self
        room = max_positions - max(self.tokens)
        if room < 2:
            raise DeliberateError(
                f"a context of {max_positions} positions is too short to measure passes over "
                f"{max(self.tokens)} tokens"
            )
        contexts = tuple(sorted({min(n, room) for n in self.contexts}))
        prompts = tuple(sorted({min(n, room) for n in self.prompts}))
        return replace(self, contexts=contexts, prompts=prompts)
