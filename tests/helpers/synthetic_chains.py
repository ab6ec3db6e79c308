"""Chains drawn from a known distribution: the answer becomes the final one at a random place, and
confidence tells it from others, with mistakes."""

from __future__ import annotations

import numpy as np

from deliberate.reasoning.recorded_chains import RecordedChain, RecordedProbe

LINE = 9
"""The id that ends a line."""


def synthetic_chains(
    count: int, *, seed: int = 0, lines: int = 10, line: int = 8
) -> list[RecordedChain]:
    """`lines` lines of `line` tokens each, with a probe after every one but the last."""
    random = np.random.default_rng(seed)
    chains = []
    for number in range(count):
        known = random.integers(2, lines - 1)
        right = random.random() < 0.8
        probes = []
        for at in range(1, lines):
            same = at >= known
            # An answer of before is sometimes as sure as one of after.
            low = 0.55 if same or random.random() < 0.25 else 0.2
            confidence = float(random.uniform(low, low + 0.4))
            answer = "7" if same else str(random.integers(100, 103))
            probes.append(RecordedProbe(at * line, answer, confidence, 2))
        chains.append(
            RecordedChain(
                f"synthetic/{number}",
                "7",
                "7" if right else "8",
                tuple(LINE if place % line == line - 1 else 1 for place in range(lines * line)),
                answer_tokens=3,
                probes=tuple(probes),
            )
        )
    return chains
