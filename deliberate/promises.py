"""Turns "certified" and "budget" into what the decode loop takes: thresholds, a pacer, a monitor.

Both decode like threshold mode: a token that leaves stands. What differs is where the thresholds
come from and what is promised of them.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deliberate.budget import Feasibility, LatencyBudget, feasibility
from deliberate.certificate import Certificate, Risk
from deliberate.controller import BudgetController, BudgetReport
from deliberate.cost import CostModel
from deliberate.cost_meter import Work, WorkMeter
from deliberate.drift import DriftMonitor
from deliberate.errors import DeliberateError
from deliberate.lengths import LengthPredictor
from deliberate.pacing import FixedPacer
from deliberate.policy import PolicyTable, StepCosts

if TYPE_CHECKING:
    from deliberate.calibration import Calibration
    from deliberate.decoding import DecodeLoop
    from deliberate.model import AdaptiveModel

# Every so many deep passes the monitor looks at what the full depth says of tokens that left.
LOOK_EVERY = 4
# Responses whose speed says how fast the machine is now.
REMEMBERED = 9


class CertifiedPacer(FixedPacer):
    """A certificate's thresholds, and what the traffic says of it."""

    def __init__(self, certificate: Certificate, drift: DriftMonitor, offset: int) -> None:
        super().__init__(certificate.thresholds, certificate.band)
        self.certificate = certificate
        self.drift = drift
        self.offset = offset % LOOK_EVERY
        self._agreed = self._seen = 0

    def look(self, agreed: int, seen: int) -> None:
        """Tokens that left early, seen again at full depth."""
        self._agreed += agreed
        self._seen += seen

    def end(self, now: float, tokens: int) -> None:
        """The answer is complete: the drift monitor hears of it."""
        self.drift.update(self._seen - self._agreed, self._seen)
        self._agreed = self._seen = 0


class BudgetPacer:
    """A `Pacer` around a controller that also tells it what work was run."""

    def __init__(
        self,
        controller: BudgetController,
        table: PolicyTable,
        cost: CostModel,
        exits: Sequence[int],
        observe_speed: Callable[[float], None],
    ) -> None:
        self.controller = controller
        self._table = table
        self._decided = False
        self._observe_speed = observe_speed
        self.report: BudgetReport | None = None
        self.loop: DecodeLoop | None = None
        self._cost = cost
        self._exits = tuple(exits)

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """See `Pacer`."""
        self._decided = False
        self.controller.begin(now, prompt_tokens, max_new_tokens)
        if self.loop is not None:
            batch, gate = self.loop.batch, self.loop.gate
            thoughts = None if gate is None else batch.thoughts
            work = Work(
                self._exits, batch.passes, reads=batch.reads, thoughts=thoughts, runs=batch.runs
            )
            self.controller.watch(WorkMeter(self._cost, work))

    @property
    def band(self) -> float | None:
        """The deliberation gate's at the price taken last; its own before the first decision."""
        return self._table.band(self.controller.price) if self._decided else None

    def thresholds(self, now: float, tokens: int) -> Sequence[float]:
        """See `Pacer`."""
        self._decided = True
        return self.controller.thresholds(now, tokens)

    def end(self, now: float, tokens: int) -> None:
        """The response is complete."""
        self.report = self.controller.end(now, tokens)
        self._observe_speed(self.report.speed)


class Promises:
    """What one model remembers between generations for its certificates and budgets."""

    def __init__(self) -> None:
        self._drift: dict[str, DriftMonitor] = {}
        self._controllers: dict[LatencyBudget, BudgetController] = {}
        self._lengths = LengthPredictor()
        self._cost: CostModel | None = None
        # How much slower than its cost model the machine was of late, whatever the budget.
        self._speeds: deque[float] = deque(maxlen=REMEMBERED)
        # A calibration, and those of its certificates that were checked against it.
        self._accepted: tuple[Calibration | None, list[Certificate]] = (None, [])
        self._turns = itertools.count()

    def clear(self) -> None:
        """Forgets everything (the calibration or the exits have changed)."""
        self.__init__()  # type: ignore[misc]

    # -- a price -------------------------------------------------------------------------------

    def priced(self, model: AdaptiveModel, price: float) -> FixedPacer:
        """Exits and band at one price, in the unit of the calibration's policy.

        Raises:
            DeliberateError: no calibration, one of another model, or a price below 0.
        """
        table = self._checked(model).policy
        return FixedPacer(table.thresholds(price), table.band(price))

    @staticmethod
    def _checked(model: AdaptiveModel) -> Calibration:
        calibration = model.require_calibration()
        weights, exits = model.fingerprints()
        calibration.check(weights=weights, exits=exits)
        return calibration

    # -- certified -----------------------------------------------------------------------------

    def certified(
        self,
        model: AdaptiveModel,
        *,
        risk: Risk | str = Risk.ACCURACY,
        epsilon: float | None = None,
        delta: float | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> CertifiedPacer:
        """A generation under the cheapest certificate that keeps the promise.

        Args:
            conditions: what is known of the generation, by the names of `Certificate.conditions`.

        Raises:
            DeliberateError: no such certificate, one of another model, one that its calibration
                does not support or made under other conditions, or one that has expired because
                the traffic is not what it was made for.
        """
        calibration = self._checked(model)
        certificate = calibration.certificate(risk, epsilon=epsilon, delta=delta)
        self._check_certificate(calibration, certificate)
        certificate.check(conditions=conditions)
        drift = self.drift(certificate)
        if drift.alarm:
            raise DeliberateError(
                f"the certificate has expired: {drift.disagreements} of {drift.tokens} verified "
                f"tokens disagree with full depth where it allows {certificate.disagreement:.2%}; "
                "run `deliberate calibrate` on this traffic, or use fidelity='exact'"
            )
        return CertifiedPacer(certificate, drift, next(self._turns))

    def drift(self, certificate: Certificate) -> DriftMonitor:
        """The monitor of this certificate's traffic."""
        key = f"{certificate.policy} {certificate.price} {certificate.risk} {certificate.epsilon}"
        if key not in self._drift:
            self._drift[key] = DriftMonitor.for_certificate(certificate)
        return self._drift[key]

    def _check_certificate(self, calibration: Calibration, certificate: Certificate) -> None:
        """Checks a certificate against its calibration, once for each pair."""
        held, accepted = self._accepted
        if held is not calibration:
            accepted = []
            self._accepted = (calibration, accepted)
        if not any(one is certificate for one in accepted):
            calibration.check_certificate(certificate)
            accepted.append(certificate)

    # -- budget --------------------------------------------------------------------------------

    def cost(self, model: AdaptiveModel) -> CostModel:
        """The cost model of this model here; measured on first use and cached on disk."""
        if self._cost is None:
            from deliberate.cost_measure import cached_cost

            self._cost = cached_cost(
                model.backbone, model.reader(), model.exit_config, gate=model.gate
            )
        return self._cost

    def feasibility(
        self, model: AdaptiveModel, budget: LatencyBudget, prompt_tokens: int, limit: int
    ) -> Feasibility:
        """Whether a budget can be met for a prompt of so many tokens."""
        cost = self.cost(model)
        speed = statistics.median(self._speeds) if self._speeds else 1.0
        context = prompt_tokens + limit / 2
        found = feasibility(
            budget,
            least_seconds_per_token=speed
            * cost.least_seconds_per_token(model.exit_config.max_pending, context),
            dense_seconds_per_token=speed * cost.dense_seconds_per_token(context),
            expected_tokens=min(limit, self._lengths.mean(0, limit)),
            prompt_seconds=speed * cost.prompt_seconds(prompt_tokens),
        )
        if not found.feasible and self._speeds:
            # A refusal brings no new measurement: the old ones lose their say, or a machine that
            # was busy for a moment would be refused for ever.
            self._speeds.popleft()
        return found

    def budget(self, model: AdaptiveModel, budget: LatencyBudget) -> BudgetPacer:
        """The pacer of a generation within a budget.

        One controller serves all generations with the same budget: what it has learnt about
        machine, text and lengths carries over.
        """
        calibration = self._checked(model)
        cost = self.cost(model)
        if budget not in self._controllers:
            table = calibration.policy
            pending = model.exit_config.max_pending
            steps = StepCosts(
                cost.first_seconds(), cost.continuation_seconds(), round=cost.round_seconds
            )
            self._controllers[budget] = BudgetController(
                budget,
                table,
                cost.policy_seconds(table.costs(steps), pending),
                least=cost.least_seconds_per_token(pending),
                lengths=self._lengths,
            )
        return BudgetPacer(
            self._controllers[budget],
            calibration.policy,
            cost,
            model.exit_config.layers,
            self._speeds.append,
        )
