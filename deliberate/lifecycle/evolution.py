"""A round of self-evolution: from a sample of the traffic to a policy that may be tried on it.

The traffic's full-depth answers are run through the exits once; half of them fit calibrators and a
policy, the other half, which neither has seen, must give a certificate (Learn then Test,
`deliberate.calibration.certificate`) and shows in a replay what the policy costs beside the live
one. Every step is in the registry, a policy that fails with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration, fit_calibration
from deliberate.calibration.certificate import Certificate, Risk, fixed_sequence, token_losses
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.conditions import PROMPT_ENDS, conditions_sha256, prompt_ends
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.config import check_guarantee
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.calibrate.costs import step_costs
from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.traffic import Exchange
from deliberate.lifecycle.version import Kind, Source, State, Version
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256

FOLDER = "calibrations"


@dataclass(frozen=True)
class EvolutionSettings:
    """Limits of a round.

    Attributes:
        epsilon, delta: the guarantee that a policy must have: with probability 1 - delta at most
            this share of an answer's tokens differs from full depth.
        least_gain: share of the live policy's cost that it must save in the replay.
        seed: of the halves.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    epsilon: float = 0.02
    delta: float = 0.1
    least_gain: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        check_guarantee(self.epsilon, self.delta)
        if not 0.0 <= self.least_gain < 1.0:
            raise DeliberateError(f"least_gain {self.least_gain} must lie in [0, 1)")


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        steps: in words, in their order.
        version: that was proposed: in state shadow, or rolled back.
    """

    steps: tuple[str, ...]
    version: Version


def evolve(
    model: AdaptiveModel,
    exchanges: Sequence[Exchange],
    registry: VersionRegistry,
    settings: EvolutionSettings | None = None,
    *,
    who: str = "evolve",
) -> Round:
    """One round on a sample of the traffic of the live version, whose model this is.

    Raises:
        DeliberateError: no live version, or too little traffic to fit on; nothing is recorded.
    """
    settings = settings or EvolutionSettings()
    live = registry.live()
    if live is None:
        raise DeliberateError(f"no version is live in {registry.folder}: serve one first")
    kept = [one for one in exchanges if one.answer]
    answers = [one.answer if one.dense else _decoded(model, one) for one in kept]
    sequences = [[*one.prompt, *answer] for one, answer in zip(kept, answers, strict=True)]
    if len(sequences) < 2:
        raise DeliberateError(f"{len(sequences)} answers were kept: serve more greedy requests")
    recording = record_sequences(model, sequences, [len(one.prompt) for one in kept])
    steps = [f"recorded {len(recording)} tokens of {len(sequences)} answers at every exit"]
    fit, held = recording.halves(settings.seed)
    costs = step_costs(model.guarantees.known_cost(model), recording)
    weights, exits = model.fingerprints()
    data = json_sha256(sequences)
    try:
        made = fit_calibration(fit, costs, weights=weights, exits=exits, data=data)
    except DeliberateError as error:  # too few, or all alike
        raise DeliberateError(f"{error}: serve more greedy requests") from None
    steps.append(f"fitted a policy of {len(made.policy.rows)} members on {fit.num_sequences}")
    conditions = _conditions(model, kept)
    certificate, refusal = _certified(made, held, settings, conditions)
    if certificate is not None:
        made = made.with_certificates(certificate)
    made = replace(made, meta={"created": _now(), "traffic": len(sequences)})
    path = registry.folder / FOLDER / f"{made.to_dict()['sha256'][:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    thresholds = None if certificate is None else certificate.thresholds
    source = Source(live.source.model, str(path.absolute()), "threshold", thresholds)
    source = replace(source, weights=live.source.weights)
    version = registry.propose(
        Kind.POLICY,
        source,
        parent=live.id,
        reason=f"fitted on {len(sequences)} answers of the traffic",
        who=who,
        figures={"tokens": len(recording), "answers": len(sequences), "data": data},
    )
    if certificate is None or thresholds is None:
        steps.append(refusal)
        return _failed(registry, version, steps, refusal, who, {})
    steps.append(
        f"certified: at most {certificate.epsilon:.2%} of tokens differ with probability "
        f"{1 - certificate.delta:.0%} ({certificate.observed:.3%} on {certificate.n} answers)"
    )
    figures = _replayed(held, costs, thresholds, _live_thresholds(model, live))
    gain = 1 - figures["cost"] / figures["live_cost"]
    figures |= {"gain": round(gain, 4), "certificate": _plain(certificate)}
    text = (
        f"replayed {len(held)} tokens: {figures['cost']:.4g} {costs.unit} a token, live "
        f"{figures['live_cost']:.4g} ({gain:+.1%} saved)"
    )
    steps.append(text)
    if gain < settings.least_gain:
        reason = f"it saves {gain:.1%}, at least {settings.least_gain:.1%} is needed"
        return _failed(registry, version, steps, reason, who, figures)
    version = registry.move(version.id, State.SHADOW, reason=text, who=who, figures=figures)
    return Round(tuple(steps), version)


def _failed(
    registry: VersionRegistry,
    version: Version,
    steps: Sequence[str],
    reason: str,
    who: str,
    figures: dict[str, Any],
) -> Round:
    """The version is rolled back for this reason."""
    made = registry.move(version.id, State.ROLLED_BACK, reason=reason, who=who, figures=figures)
    return Round((*steps, f"rolled back: {reason}"), made)


def _decoded(model: AdaptiveModel, exchange: Exchange) -> tuple[int, ...]:
    """The answer at full depth."""
    ids = torch.tensor([exchange.prompt], device=model.device)
    made = model.generate(ids, max_new_tokens=exchange.limit, do_sample=False, fidelity="dense")
    return tuple(made[0, ids.shape[1] :].tolist())


def _conditions(model: AdaptiveModel, kept: Sequence[Exchange]) -> dict[str, Any]:
    limit = max(one.limit for one in kept)
    made = decoding_conditions(model, DecodingSpec(), max_new_tokens=limit) | {"kv_mode": "defer"}
    made.pop("max_pending", None)  # agreement of single tokens does not depend on it
    return made | {PROMPT_ENDS: prompt_ends([one.prompt for one in kept])}


def _certified(
    calibration: Calibration,
    held: Recording,
    settings: EvolutionSettings,
    conditions: dict[str, Any],
) -> tuple[Certificate | None, str]:
    """A certificate of the agreement of tokens, or why there is none."""
    policy = calibration.policy
    if all(math.isinf(one) for one in policy.lambdas):
        return None, "no exit pays on this traffic"
    testing = fixed_sequence(
        policy.lambdas,
        lambda lambda_: token_losses(held, policy.thresholds(lambda_)),
        Risk.TOKEN,
        epsilon=settings.epsilon,
        delta=settings.delta,
    )
    passed = testing.certified
    if passed is None:
        return None, testing.refusal()
    made = Certificate(
        risk=Risk.TOKEN,
        epsilon=settings.epsilon,
        delta=settings.delta,
        n=passed.n,
        observed=passed.mean,
        lambda_=passed.lambda_,
        thresholds=policy.thresholds(passed.lambda_),
        disagreement=settings.epsilon,
        weights=calibration.weights,
        exits=calibration.exits,
        policy=policy.sha256,
        data=calibration.data,
        conditions=conditions,
        conditions_sha256=conditions_sha256(conditions),
        created=_now(),
    )
    return made, ""


def _live_thresholds(model: AdaptiveModel, live: Version) -> tuple[float, ...]:
    """Where the live version's tokens exit without being verified; never in exact and dense."""
    if live.source.fidelity == "threshold":
        return live.source.thresholds or model.exit_config.thresholds
    return (math.inf,) * len(model.exit_config.layers)


def _replayed(
    held: Recording,
    costs: StepCosts,
    thresholds: Sequence[float],
    live: Sequence[float],
) -> dict[str, Any]:
    """Risk, cost and depth of both on the same tokens."""
    new, old = replay(held, np.asarray(thresholds)), replay(held, np.asarray(live))
    return {
        "tokens": len(held),
        "risk": new.risk,
        "live_risk": old.risk,
        "cost": float(new.seconds(costs.first, costs.onward).mean()),
        "live_cost": float(old.seconds(costs.first, costs.onward).mean()),
        "layers": new.mean_layers,
        "live_layers": old.mean_layers,
    }


def _plain(certificate: Certificate) -> dict[str, Any]:
    kept = ("epsilon", "delta", "n", "observed")
    return {name: value for name, value in asdict(certificate).items() if name in kept}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
