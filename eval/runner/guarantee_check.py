"""The guarantees of a run: checked before the first problem, accounted for after each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.certificate import Certificate, Risk
from deliberate.calibration.conditions import LIMIT
from deliberate.eval.runner.guarantees import BudgetInfo, CertifiedInfo
from deliberate.eval.runner.outcomes import BudgetOutcome
from deliberate.eval.tasks.prompts import condition_departures
from deliberate.policies.budget import DEFAULT_TIERS, Feasibility, LatencyBudget
from deliberate.policies.controller import BudgetReport
from deliberate.trace import GenerationTrace
from deliberate.utils.errors import DeliberateError


class GuaranteeCheck:
    """Certificate and budget of one run.

    Args:
        model: with a calibration, where one of the modes needs it.
        certificate: risk, epsilon and delta of certified mode; None where it is not run.
        budget: of budget mode; None where it is not run.
        conditions: of the run, as certificates name them.
        tokenizer: of the run.

    Attributes:
        refused: problems at which nothing could have met the budget.
        departures: conditions of the certificate that the run does not keep, in words.

    Raises:
        DeliberateError: no calibration, or one of another model; no such certificate.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        certificate: Mapping[str, Any] | None,
        budget: LatencyBudget | None,
        conditions: Mapping[str, Any],
        tokenizer: Any = None,
    ) -> None:
        self.model, self.budget = model, budget
        self.refused = 0
        self.certificate: Certificate | None = None
        self.departures: list[str] = []
        self._typical: Feasibility | None = None
        self._wanted = certificate
        if certificate is not None:
            found = model.guarantees.certified(model, **certificate).certificate
            self.certificate = found
            self.departures = condition_departures(found.conditions, conditions, tokenizer)

    def certified_settings(self) -> Mapping[str, Any]:
        """What `generate` is given for an answer in certified mode, the fidelity included."""
        assert self._wanted is not None
        if self.departures:
            return policy_alone(self.model, self._wanted)
        return {"fidelity": "certified", **self._wanted}

    def before(self, prompts: Sequence[int], limit: int) -> None:
        """Measures what decoding costs and checks the budget for prompts of these lengths.

        Raises:
            DeliberateError: nothing can meet the budget at the shortest prompt.
        """
        if self.budget is None:
            return
        self.model.guarantees.budget(self.model, self.budget)  # a foreign calibration is named here
        self.feasibility(min(prompts), limit).require()
        self._typical = self.feasibility(int(median(prompts)), limit)

    def feasibility(self, prompt_tokens: int, limit: int) -> Feasibility:
        """Of the budget, for a prompt of so many tokens."""
        assert self.budget is not None
        return self.model.guarantees.feasibility(self.model, self.budget, prompt_tokens, limit)

    def possible(self, prompt_tokens: int, limit: int) -> bool:
        """Whether the budget can be met; counts the problems where it cannot."""
        possible = self.feasibility(prompt_tokens, limit).feasible
        self.refused += not possible
        return possible

    @property
    def expired(self) -> bool:
        """The certificate no longer describes the traffic: `generate` would refuse."""
        found = self.certificate
        return found is not None and self.model.guarantees.drift(found).alarm

    def state(self) -> dict[str, Any]:
        """What the rest of the run depends on, JSON-ready: the drift monitor's."""
        if self.certificate is None:
            return {}
        return {"drift": self.model.guarantees.drift(self.certificate).snapshot()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state` of the same run.

        Raises:
            DeliberateError: it is of another run, or damaged.
        """
        if self.certificate is not None and "drift" in state:
            self.model.guarantees.drift(self.certificate).restore(state["drift"])

    def outcome(
        self, report: BudgetReport, trace: GenerationTrace, seconds: float
    ) -> BudgetOutcome:
        """An answer's account; `seconds` are those of the whole call."""
        return BudgetOutcome(
            met=report.met,
            met_whole=1e3 * seconds <= report.allowed_ms,
            allowed_seconds=report.allowed_ms / 1e3,
            expected_disagreement=expected_disagreement(self.model, trace),
            guarded=report.guarded,
            speed=report.speed,
        )

    def certified_info(self) -> CertifiedInfo | None:
        """The certificate and the drift monitor's state."""
        found = self.certificate
        if found is None:
            return None
        drift = self.model.guarantees.drift(found)
        return CertifiedInfo(
            risk=str(found.risk),
            epsilon=found.epsilon,
            delta=found.delta,
            n=found.n,
            observed=found.observed,
            price=None if math.isinf(found.lambda_) else found.lambda_,
            thresholds=[None if math.isinf(value) else value for value in found.thresholds],
            weights=found.weights,
            exits=found.exits,
            policy=found.policy,
            data=found.data,
            conditions=dict(found.conditions),
            departures=self.departures,
            limit=drift.limit,
            answers=drift.answers,
            tokens=drift.tokens,
            disagreements=drift.disagreements,
            evidence=drift.evidence,
            alarm_at=drift.run_length,
            alarm=drift.alarm,
            band=found.gate_threshold,
        )

    def budget_info(self) -> BudgetInfo | None:
        """The budget and its feasibility."""
        if self._typical is None:
            return None
        return BudgetInfo(
            budget=str(self.budget),
            feasibility=self._typical.message,
            feasible=self._typical.feasible,
            tight=self._typical.tight,
            ample=self._typical.ample,
            least_ms_per_token=self._typical.least_ms_per_token,
            refused=self.refused,
        )


def expected_disagreement(model: AdaptiveModel, trace: GenerationTrace) -> float:
    """Share of an answer's tokens expected to differ from full depth, from their scores.

    Raises:
        DeliberateError: the model has no calibration.
    """
    calibration = model.require_calibration()
    doubt = 0.0
    for k, layer in enumerate(calibration.layers):
        scores = [r.confidence for r in trace.records if r.exit_layer == layer]
        if scores:
            doubt += float((1.0 - calibration.probability(k, scores)).sum())
    return doubt / max(1, len(trace.records))


def certificate_notes(
    model: AdaptiveModel,
    certificate: Mapping[str, Any],
    conditions: Mapping[str, Any],
    tokenizer: Any,
) -> list[str]:
    """A note that says why the certificate does not cover a run; empty where it does.

    Args:
        certificate: risk, epsilon and delta.
        conditions: of the run, see `run_conditions`.
        tokenizer: of the model.

    Raises:
        DeliberateError: no calibration, or no such certificate.
    """
    stated = model.require_calibration().certificate(**certificate).conditions
    return not_covered(condition_departures(stated, conditions, tokenizer))


def certified_limit(model: AdaptiveModel, certificate: Mapping[str, Any]) -> int | None:
    """Most new tokens that a certificate is for; None where it does not say.

    Args:
        certificate: risk, epsilon and delta.

    Raises:
        DeliberateError: no calibration, or no such certificate.
    """
    stated = model.require_calibration().certificate(**certificate).conditions.get(LIMIT)
    return None if stated is None else int(stated)


def policy_alone(model: AdaptiveModel, certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that decode by a certificate's policy under conditions that it does not cover.

    `generate` refuses the certificate there. What its policy does there can be measured all the
    same, in threshold mode, without its guarantee.

    Args:
        certificate: risk, epsilon and delta.
    """
    policy = model.guarantees.certified(model, **certificate)
    return {"fidelity": "threshold", "exit_policy": policy}


def not_covered(departures: Sequence[str]) -> list[str]:
    """The note for conditions that a run does not keep, and what decoded; empty without any."""
    if not departures:
        return []
    return [
        f"The certificate guarantees nothing for this run: {'; '.join(departures)}. "
        "Its exits decoded by themselves, also where `generate` would verify drafts or run every "
        "layer because that is faster."
    ]


def as_run_budget(
    ms_per_token: float | None,
    deadline_ms: float | None,
    tier: str | None,
    tiers: Mapping[str, float],
) -> LatencyBudget | None:
    """The budget that settings name; None where they name none.

    Raises:
        DeliberateError: more than one, or one that cannot be.
    """
    given = {
        name: value
        for name, value in (
            ("ms_per_token", ms_per_token),
            ("deadline_ms", deadline_ms),
            ("tier", tier),
        )
        if value is not None
    }
    if not given:
        return None
    if len(given) > 1:
        raise DeliberateError(f"budget: {' and '.join(given)} are given: a budget is one of them")
    if tier is not None:
        return LatencyBudget.tier(str(tier), tiers)
    return LatencyBudget(ms_per_token=ms_per_token, deadline_ms=deadline_ms)


def guarantee_arguments(
    fidelity: str,
    *,
    budget: tuple[float | None, float | None, str | None],
    certificate: Mapping[str, Any],
) -> dict[str, Any]:
    """What fidelity ``budget`` or ``certified`` is given besides its name, from options.

    Args:
        budget: milliseconds per token, deadline in milliseconds, tier.
        certificate: risk, epsilon and delta.

    Raises:
        DeliberateError: options of another fidelity, or ones that cannot be.
    """
    found = as_run_budget(*budget, DEFAULT_TIERS)
    if found is not None and fidelity != "budget":
        raise DeliberateError(f"a budget with fidelity {fidelity!r}: it needs fidelity 'budget'")
    if fidelity == "budget":
        if found is None:
            raise DeliberateError(
                "fidelity 'budget' needs --budget-ms, --deadline-ms or --tier, e.g. --budget-ms 3"
            )
        return {"latency_budget": found}
    if fidelity == "certified":
        if certificate["risk"] not in list(Risk):
            raise DeliberateError(f"risk {certificate['risk']!r} is not one of {', '.join(Risk)}")
        return dict(certificate)
    for name in ("epsilon", "delta"):
        if certificate[name] is not None:
            raise DeliberateError(f"{name} with fidelity {fidelity!r}: it needs 'certified'")
    return {}
