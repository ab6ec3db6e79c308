"""Certificates of the risk of stopping chains: Learn then Test over the probability to stop from.

One loss a chain, on chains that the curves were not fitted on; probabilities are tested from the
most careful on (`deliberate.calibration.certificate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from deliberate.calibration.certificate import (
    Certificate,
    Testing,
    accuracy_losses,
    fixed_sequence,
    upper_bound,
)
from deliberate.calibration.conditions import conditions_sha256
from deliberate.config import Risk
from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.chain_walks import Walk
from deliberate.reasoning.recorded_chains import ChainSet
from deliberate.utils.checks import one_of
from deliberate.utils.errors import DeliberateError

LOSSES = ("accuracy", "changed")

THRESHOLDS = (
    *(0.9995, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9),
    *(0.88, 0.85, 0.82, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3),
)
"""Probabilities that are tested, fixed before any chain is seen."""


def walk_probabilities(calibration: ChainCalibration, walks: Sequence[Walk]) -> list[list[float]]:
    """The calibrated probability of every probe of every walk."""
    return [
        [calibration.probability(look.confidence, look.streak) for look in one.looks]
        for one in walks
    ]


def chain_losses(
    calibration: ChainCalibration,
    walks: Sequence[Walk],
    thresholds: Sequence[float],
    loss: str = "accuracy",
) -> NDArray[np.float64]:
    """0/1 loss of each chain, ``[K, P]``, of stopping from each of K probabilities on.

    Args:
        loss: ``accuracy``: the whole chain is right and the answer at the stop wrong;
            ``changed``: that answer is another than the whole chain's, right or wrong.

    Raises:
        DeliberateError: `accuracy` without reference answers.
    """
    one_of("loss", loss, LOSSES)
    whole = [one.right for one in walks]
    if loss == "accuracy" and None in whole:
        raise DeliberateError("loss=accuracy needs chains with expected answers: use loss=changed")
    found = walk_probabilities(calibration, walks)
    losses = []
    for threshold in thresholds:
        looks = [
            next((look for look, p in zip(one.looks, own, strict=True) if p >= threshold), None)
            for one, own in zip(walks, found, strict=True)
        ]
        if loss == "changed":
            changed = [look is not None and not look.same for look in looks]
            losses.append(np.asarray(changed, dtype=np.float64))
            continue
        stopped = [
            right if look is None else look.right for look, right in zip(looks, whole, strict=True)
        ]
        losses.append(
            accuracy_losses(np.asarray(whole, dtype=bool), np.asarray(stopped, dtype=bool))
        )
    return np.stack(losses)


def certify_chains(
    calibration: ChainCalibration,
    testing: ChainSet,
    walks: Sequence[Walk],
    *,
    epsilon: float,
    delta: float,
    loss: str = "accuracy",
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[Testing, Certificate | None]:
    """Learn then Test over the probability to stop from, the most careful first.

    Args:
        calibration: fitted on other chains.
        testing: the chains of `walks`, whose header states model and conditions.
        walks: of the chains that test, independent draws: one chain a problem.
        thresholds: fixed before the losses are seen.

    Raises:
        DeliberateError: two chains of one problem, or see `fixed_sequence`.
    """
    names = [chain.id for chain in testing.chains]
    if len(set(names)) < len(names):
        raise DeliberateError("several chains of one problem cannot test: they are not independent")
    order = list(thresholds)
    losses = chain_losses(calibration, walks, order, loss)
    done = fixed_sequence(
        order,
        lambda threshold: losses[order.index(threshold)],
        Risk.ACCURACY,
        epsilon=epsilon,
        delta=delta,
    )
    passed = done.certified
    if passed is None:
        return done, None
    header = testing.header
    conditions = dict(header.conditions) | {"loss": loss}
    (changed,) = chain_losses(calibration, walks, [passed.lambda_], "changed")
    return done, Certificate(
        risk=Risk.ACCURACY,
        epsilon=epsilon,
        delta=delta,
        n=passed.n,
        observed=passed.mean,
        lambda_=passed.lambda_,
        thresholds=(passed.lambda_,),
        disagreement=upper_bound(changed, delta),
        weights=header.weights,
        exits=header.exits,
        policy=calibration.sha256,
        data=testing.sha256,
        conditions=conditions,
        conditions_sha256=conditions_sha256(conditions),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class Resampled:
    """Certificates over resampled testing chains.

    Attributes:
        resamples: draws.
        certified: that gave a certificate.
        violated: whose certified threshold has a risk above epsilon on all chains.
        naive: whose cheapest threshold with an observed risk of at most epsilon has one.
    """

    resamples: int
    certified: int
    violated: int
    naive: int


def resample_certificates(
    losses: NDArray[np.float64],
    size: int,
    *,
    epsilon: float,
    delta: float,
    resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """Draws testing sets from a pool of chains and compares each certificate with the pool's risk.

    Args:
        losses: ``[K, P]`` of 0 and 1: of the P chains of the pool at each of K thresholds, the most
            careful first.
        size: chains of a testing set, drawn with replacement.
    """
    random = np.random.default_rng(seed)
    truth = losses.mean(axis=1)
    order = [float(len(losses) - k) for k in range(len(losses))]
    certified = violated = naive = 0
    for _ in range(resamples):
        drawn = losses[:, random.integers(0, losses.shape[1], size)]
        drawn_at = dict(zip(order, drawn, strict=True))
        tested = fixed_sequence(
            order, drawn_at.__getitem__, Risk.ACCURACY, epsilon=epsilon, delta=delta
        )
        done = tested.certified
        if done is not None:
            certified += 1
            violated += bool(truth[len(losses) - int(done.lambda_)] > epsilon)
        passing = np.flatnonzero(drawn.mean(axis=1) <= epsilon)
        naive += bool(len(passing)) and bool(truth[passing[-1]] > epsilon)
    return Resampled(resamples, certified, violated, naive)
