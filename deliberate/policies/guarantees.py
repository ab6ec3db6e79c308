"""Turns "certified" and "budget" into exit policies for the decode loop.

Both decode like threshold mode: a token that exits early is accepted. What differs is where the
thresholds come from and what is guaranteed of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import statistics
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deliberate.calibration.certificate import Certificate, Risk
from deliberate.calibration.conditions import PROMPT_ENDS, unstated
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.config import Fidelity
from deliberate.cost.cache import fingerprint, recall
from deliberate.cost.model import TYPICAL_CONTEXT, CostModel
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.model_view import ModelView
from deliberate.policies.budget import Feasibility, LatencyBudget, feasibility
from deliberate.policies.controller import BudgetController
from deliberate.policies.controller_settings import ControllerSettings
from deliberate.policies.drift import DriftMonitor, DriftState
from deliberate.policies.exit_policies import BudgetPolicy, CertifiedPolicy, ExactPolicy
from deliberate.policies.faster_member import faster_member
from deliberate.policies.lengths import LengthPredictor, recorded_lengths
from deliberate.policies.member_costs import MemberCosts, member_costs
from deliberate.policies.row_times import RowTimes
from deliberate.utils.errors import DeliberateError

if TYPE_CHECKING:
    from deliberate.calibration.calibration import Calibration

# Controllers kept at a time: one for each budget and batch size, the least recent given up first.
MOST_CONTROLLERS = 16
# Costs kept at a time, of a length of text and a batch size each.
MOST_MEMBERS = 64
# Answers heard before exact mode is planned for their lengths under a deadline.
ENOUGH_ANSWERS = 8
# Contexts within so many tokens of each other share their costs.
_CONTEXTS = 64
# Exact mode takes a budget, or a certificate's place, only where it is this much faster: its time
# depends on the text, and cannot be cut short.
EXACT_MARGIN = 1.1
# Responses whose speed says how fast the machine is now.
REMEMBERED = 9


class CalibratedModel(ModelView, Protocol):
    """A model that may carry a calibration."""

    def require_calibration(self) -> Calibration:
        """The calibration, or an error that says how to get one."""

    def fingerprints(self) -> tuple[str, str]:
        """SHA-256 of the base weights and of the exits, as they are now."""

    def backbone_for(self, batch: int) -> Backbone:
        """The layers that decode a batch of this size."""


class Guarantees:
    """What one model remembers between generations for its certificates and budgets."""

    def __init__(self) -> None:
        self._drift: dict[str, DriftMonitor] = {}
        # By budget and batch size; 0 for an engine's requests, which share passes with others.
        self._controllers: OrderedDict[tuple[LatencyBudget, int], BudgetController] = OrderedDict()
        # By what the caller asked for; without experience, those that the calibration recorded.
        self._lengths: LengthPredictor | None = None
        self._recorded = 0
        self._cost: CostModel | None = None
        self._cost_key: object = None
        # With what they were computed from, so that a new object at an old address is not mistaken.
        self._members: dict[Any, tuple[CostModel, PolicyTable, MemberCosts]] = {}
        self._times: dict[int, tuple[MemberCosts, RowTimes]] = {}
        # Seconds of exact mode over those expected of it.
        self._exact: deque[float] = deque(maxlen=REMEMBERED)
        # How much slower than its cost model the machine was of late, whatever the budget.
        self._speeds: deque[float] = deque(maxlen=REMEMBERED)
        # A calibration, and those of its certificates that were checked against it.
        self._accepted: tuple[Calibration | None, list[Certificate]] = (None, [])
        self._turns = itertools.count()
        self._said = False  # why another mode decodes than a certificate's
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forgets everything (the calibration or the exits have changed)."""
        self.__init__()  # type: ignore[misc]

    # -- a lambda ------------------------------------------------------------------------------

    def fixed_lambda(self, model: CalibratedModel, lambda_: float) -> FixedPolicy:
        """Exit and gate thresholds at one lambda, in the unit of the calibration's policy.

        Raises:
            DeliberateError: no calibration, one of another model, or a lambda below 0.
        """
        table = self._checked(model).policy
        return FixedPolicy(table.thresholds(lambda_), table.gate_threshold(lambda_))

    @staticmethod
    def _checked(model: CalibratedModel) -> Calibration:
        calibration = model.require_calibration()
        weights, exits = model.fingerprints()
        calibration.check(weights=weights, exits=exits)
        return calibration

    # -- certified -----------------------------------------------------------------------------

    def certified(
        self,
        model: CalibratedModel,
        *,
        risk: Risk | str = Risk.ACCURACY,
        epsilon: float | None = None,
        delta: float | None = None,
        conditions: Mapping[str, Any] | None = None,
        prompts: Sequence[Tensor | Sequence[int]] = (),
    ) -> CertifiedPolicy:
        """A generation under the fastest certificate that meets the guarantee.

        Args:
            conditions: what is known of the generation, by the names of `Certificate.conditions`.
            prompts: token ids of each ``[n_i]``, compared with the certificate's prompt form.

        Raises:
            DeliberateError: no such certificate, one of another model, one that its calibration
                does not support or made under other conditions, or one that has expired because
                the traffic is not what it was made for.
        """
        calibration = self._checked(model)
        certificate = calibration.certificate(risk, epsilon=epsilon, delta=delta)
        self._check_certificate(calibration, certificate)
        certificate.check(conditions=conditions)
        if prompts and PROMPT_ENDS in certificate.conditions:
            certificate.check(prompts=[torch.as_tensor(prompt).tolist() for prompt in prompts])
        drift = self.drift(certificate)
        if drift.alarm:
            raise DeliberateError(
                f"the certificate has expired: {drift.disagreements} of {drift.tokens} verified "
                f"tokens disagree with full depth where it allows {certificate.disagreement:.2%}; "
                "run `deliberate calibrate` on this traffic, or use fidelity='exact'"
            )
        return CertifiedPolicy(certificate, drift, next(self._turns))

    def drift(self, certificate: Certificate) -> DriftMonitor:
        """The monitor of this certificate's traffic."""
        key = f"{certificate.policy} {certificate.lambda_} {certificate.risk} {certificate.epsilon}"
        if key not in self._drift:
            self._drift[key] = DriftMonitor.for_certificate(certificate)
        return self._drift[key]

    def drift_states(self) -> list[DriftState]:
        """What the monitors of the certificates that were used have seen."""
        return [monitor.state for monitor in list(self._drift.values())]

    def _check_certificate(self, calibration: Calibration, certificate: Certificate) -> None:
        """Checks a certificate against its calibration, once for each pair."""
        held, accepted = self._accepted
        if held is not calibration:
            accepted = []
            self._accepted = (calibration, accepted)
        if not any(one is certificate for one in accepted):
            calibration.check_certificate(certificate)
            for name in unstated(certificate.conditions):
                warnings.warn(
                    f"the certificate does not state {name}, so no request is compared with it: "
                    "calibrate again",
                    stacklevel=2,
                )
            accepted.append(certificate)

    # -- budget --------------------------------------------------------------------------------

    def cost(self, model: CalibratedModel) -> CostModel:
        """The cost model of this model here; measured on first use and cached on disk."""
        known = self.known_cost(model)
        if known is None:
            from deliberate.cost.measure import cached_cost

            known = self._cost = cached_cost(
                model.backbone, model.reader(), model.exit_config, gate=model.gate
            )
        return known

    def known_cost(self, model: CalibratedModel) -> CostModel | None:
        """The cost model, if it was measured on this device with these threads and dtype."""
        backbone = model.backbone_for(1)  # of the model as it is now
        key = (backbone.device, next(model.base.parameters()).dtype, torch.get_num_threads())
        if self._cost_key != key:
            if self._cost is None or self._cost_key is not None:
                self._cost = recall(fingerprint(backbone, model.exit_config, model.gate))
            self._cost_key = key
        return self._cost

    def lengths(self, calibration: Calibration) -> LengthPredictor:
        """Of earlier answers; at first those that the calibration was recorded from."""
        if self._lengths is None:
            recorded = recorded_lengths(calibration.meta)
            self._lengths, self._recorded = LengthPredictor(recorded), len(recorded)
        return self._lengths

    def members(
        self,
        model: CalibratedModel,
        cost: CostModel,
        prompt_tokens: int,
        limit: int,
        batch: int,
        prompts: int | None = None,
    ) -> MemberCosts:
        """What every member of the calibration's policy family takes for such a response.

        Args:
            prompts: that are run in one pass; as many as sequences where None.
        """
        context = int(prompt_tokens + limit / 2) // _CONTEXTS * _CONTEXTS + _CONTEXTS // 2
        found = self._members_at(model, cost, context, batch)
        return replace(found, prompt=cost.prompt_seconds(prompt_tokens, prompts or batch))

    def _members_at(
        self, model: CalibratedModel, cost: CostModel, context: int, batch: int
    ) -> MemberCosts:
        """The same for so many cached tokens, the prompt not counted."""
        table = model.require_calibration().policy
        key = (id(cost), id(table), context, batch)
        held = self._members.get(key)
        if held is None or held[0] is not cost or held[1] is not table:
            if len(self._members) >= MOST_MEMBERS:
                self._members.clear()
            pending = model.exit_config.max_pending
            found = member_costs(cost, table, max_pending=pending, context=context, batch=batch)
            self._members[key] = held = (cost, table, found)
        return held[2]

    def _row_times(self, model: CalibratedModel, cost: CostModel, running: int) -> RowTimes:
        """What the policy's rows take where so many sequences share the passes."""
        costs = self._members_at(model, cost, TYPICAL_CONTEXT, running)
        held = self._times.get(running)
        if held is None or held[0] is not costs:
            rows = model.require_calibration().policy.rows
            held = (costs, RowTimes.of(rows, costs.rows, costs.least))
            self._times[running] = held
        return held[1]

    def feasibility(
        self,
        model: CalibratedModel,
        budget: LatencyBudget,
        prompt_tokens: int,
        limit: int,
        batch: int = 1,
        prompts: int | None = None,
    ) -> Feasibility:
        """Whether a budget can be met for `batch` sequences, the longest prompt of so many tokens.

        Args:
            prompts: as in `members`.
        """
        calibration = self._checked(model)
        costs = self.members(model, self.cost(model), prompt_tokens, limit, batch, prompts)
        speed = self._speed()
        found = feasibility(
            budget,
            least_seconds_per_token=speed * costs.least,
            dense_seconds_per_token=speed * costs.rows[-1],
            expected_tokens=min(limit, self.lengths(calibration).mean(0, limit)),
            prompt_seconds=speed * costs.prompt,
        )
        if not found.feasible and self._speeds:
            # A refusal brings no new measurement: the old ones lose their say, or a machine that
            # was busy for a moment would be refused for ever.
            with contextlib.suppress(IndexError):  # another thread may have done the same
                self._speeds.popleft()
        return found

    def _speed(self) -> float:
        speeds = list(self._speeds)  # other threads may add to it
        return statistics.median(speeds) if speeds else 1.0

    def exact_within(
        self,
        model: CalibratedModel,
        budget: LatencyBudget,
        prompt_tokens: int,
        limit: int,
        batch: int = 1,
        prompts: int | None = None,
    ) -> ExactPolicy | None:
        """Exact mode for a budget that it meets and full depth does not; else None."""
        calibration = self._checked(model)
        costs = self.members(model, self.cost(model), prompt_tokens, limit, batch, prompts)
        lengths = self.lengths(calibration)
        if budget.deadline_ms is None:
            tokens = min(limit, lengths.mean(0, limit))
        elif len(lengths) - self._recorded < ENOUGH_ANSWERS:
            tokens = float(limit)  # exact mode cannot be hurried where an answer is long
        else:
            tokens = float(lengths.quantile(0, limit, ControllerSettings().length_share))
        steps, speed = max(1.0, tokens - 1.0), self._speed()
        allowed = budget.allowed_seconds(tokens) - speed * costs.prompt
        if costs.exact >= costs.dense or speed * costs.rows[-1] * steps <= allowed:
            return None
        seen = list(self._exact)
        found = statistics.median(seen) if seen else speed
        if EXACT_MARGIN * found * costs.exact * steps > allowed:
            with contextlib.suppress(IndexError):
                self._exact.popleft()  # as above: it is tried again later
            return None
        thresholds = model.exit_config.thresholds
        return ExactPolicy(thresholds, budget, costs, lengths, self._exact.append)

    def faster_than(
        self,
        model: CalibratedModel,
        certificate: Certificate,
        prompt_tokens: int,
        limit: int,
        batch: int = 1,
    ) -> Fidelity | None:
        """Full depth or exact mode, where that is expected to be faster than a certificate.

        See `faster_member`; what it says of a model with a draft layer is logged once.
        """
        cost = self.known_cost(model)
        size = prompt_tokens, limit, batch
        costs = None if cost is None else self.members(model, cost, *size)
        prior = model.draft.prior if model.draft is not None and batch == 1 else None
        table = model.require_calibration().policy
        chosen, why = faster_member(certificate, table, costs, prior, margin=EXACT_MARGIN)
        if prior is not None and why and not self._said:
            self._said = True
            logging.getLogger("deliberate").warning(why)
        return chosen

    def budget(self, model: CalibratedModel, budget: LatencyBudget, batch: int = 1) -> BudgetPolicy:
        """The exit policy of a generation of `batch` sequences within a budget.

        Args:
            batch: 0 for one request of an engine: the times that its rows take then follow the
                number of requests that run.

        Generations with the same budget and batch learn from each other: each starts with a copy of
        what earlier ones learnt about machine, text and lengths, which is merged at its end
        (`BudgetController.merge`). `MOST_CONTROLLERS` are kept.
        """
        calibration = self._checked(model)
        cost = self.cost(model)
        with self._lock:
            controller = self._controller(model, calibration, cost, budget, batch)
        return BudgetPolicy(
            controller,
            calibration.policy,
            cost,
            model.exit_config.layers,
            self._speeds.append,
            None if batch else functools.partial(self._row_times, model, cost),
        )

    def _controller(
        self,
        model: CalibratedModel,
        calibration: Calibration,
        cost: CostModel,
        budget: LatencyBudget,
        batch: int,
    ) -> BudgetController:
        """What was learnt for this budget and batch, or a new controller."""
        key = (budget, batch)
        if key not in self._controllers:
            costs = self._members_at(model, cost, TYPICAL_CONTEXT, max(1, batch))
            controller = BudgetController(
                budget,
                calibration.policy,
                costs.rows,
                least=costs.least,
                lengths=self.lengths(calibration),
            )
            controller.expect_speed(self._speed())
            self._controllers[key] = controller
            while len(self._controllers) > MOST_CONTROLLERS:
                self._controllers.popitem(last=False)
        self._controllers.move_to_end(key)
        return self._controllers[key]
