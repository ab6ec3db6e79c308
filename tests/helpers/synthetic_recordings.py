"""Recordings drawn from known distributions, for tests of what is fitted to them."""

from __future__ import annotations

import numpy as np

from deliberate.calibration.exit_traces import Recording


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def synthetic_recording(
    sequences: int = 200,
    tokens: int = 20,
    *,
    seed: int = 0,
    slopes: tuple[float, ...] = (1.5, 2.0, 2.5),
    offsets: tuple[float, ...] = (0.5, 1.5, 2.5),
) -> Recording:
    """Three exits after layers 2, 4 and 6 of 8.

    A token has one hidden ease; every exit sees it through noise of its own, and agrees with
    probability sigmoid(slope * logit(score) + offset).
    """
    random = np.random.default_rng(seed)
    size = sequences * tokens
    ease = random.normal(1.0, 1.0, size)
    exits = len(slopes)
    z = ease[:, None] + random.normal(0.0, 0.4, (size, exits))
    p = sigmoid(np.asarray(slopes) * z + np.asarray(offsets))
    agrees = random.random((size, exits)) < p
    final = random.integers(0, 50, size)
    return Recording(
        layers=tuple(2 * (k + 1) for k in range(exits)),
        num_layers=2 * exits + 2,
        measure="max_prob",
        scores=sigmoid(z).astype(np.float32),
        tokens=np.where(agrees, final[:, None], final[:, None] + 1).astype(np.int32),
        final=final.astype(np.int32),
        final_scores=np.full(size, 0.9, dtype=np.float32),
        sequence=np.repeat(np.arange(sequences), tokens).astype(np.int32),
        position=np.tile(np.arange(tokens), sequences).astype(np.int32),
        groups=tuple("odd" if i % 2 else "even" for i in range(sequences)),
    )
