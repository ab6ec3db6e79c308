"""What a calibration takes from measured costs: of continuing, and the exits that lose time."""

from __future__ import annotations

from collections.abc import Sequence

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.break_even import drop_unprofitable
from deliberate.calibration.calibration import Calibration
from deliberate.calibration.certificate import Certificate
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.cost.grid import Grid
from deliberate.cost.model import CostModel
from deliberate.eval.calibrate.progress import stage

# Share of disagreeing tokens at which exits are judged where nothing is certified.
TYPICAL_RISK = 0.002


def measured_cost(model: AdaptiveModel, *, progress: bool = False) -> CostModel:
    """The cost model of this machine, measured now where it is not known yet."""
    from deliberate.cost.measure import cached_cost

    with stage("costs, in rounds", Grid().rounds, progress) as bar:
        return cached_cost(
            model.backbone,
            model.reader(),
            model.exit_config,
            gate=model.gate,
            between=lambda _count: bar.done(1),
        )


def step_costs(cost: CostModel | None, recording: Recording) -> StepCosts:
    """At a typical context and batch 1; in layers where nothing was measured."""
    if cost is None:
        return StepCosts.in_layers(recording.layers, recording.num_layers)
    always = cost.first_seconds() + cost.all_deferred_seconds()
    return StepCosts(always, cost.continuation_seconds(), round=cost.round_seconds)


def exits_that_lose_time(
    model: AdaptiveModel,
    calibration: Calibration,
    certificates: Sequence[Certificate],
    held: Recording,
) -> list[str]:
    """One sentence for each exit whose share of exiting tokens does not pay for evaluating it here.

    Judged at the certified lambda, or where nothing is certified at `TYPICAL_RISK`.
    """
    cost = measured_cost(model)
    lambdas = [certificate.lambda_ for certificate in certificates]
    lambda_ = min(lambdas) if lambdas else calibration.policy.lambda_for_risk(TYPICAL_RISK)
    counts = replay(held, calibration.thresholds(lambda_)).counts
    rates, evaluated = [], sum(counts)
    for left in counts[:-1]:
        rates.append(left / evaluated if evaluated else 0.0)
        evaluated -= left
    kept, reasons = drop_unprofitable(cost, rates)
    if not reasons:
        return []
    advice = f"exits that pay: after layers {list(kept)}" if kept else "no exit pays on this text"
    return [*reasons, f"{advice}; train with exits.layers set to them"]
