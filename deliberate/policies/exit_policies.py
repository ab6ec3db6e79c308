"""The exit policies of guarantees: a certificate's, a budget's controller, exact mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from deliberate.calibration.certificate import Certificate
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.cost.meter import Work, WorkMeter
from deliberate.cost.model import CostModel
from deliberate.engine.exit_policy import ExitPolicy, FixedPolicy
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetController
from deliberate.policies.controller_settings import BudgetReport
from deliberate.policies.drift import DriftMonitor
from deliberate.policies.lengths import LengthPredictor
from deliberate.policies.member_costs import MemberCosts
from deliberate.policies.row_times import RowTimes
from deliberate.trace import BatchTrace

# Every so many deep passes the drift monitor compares tokens that exited early with full depth.
COMPARE_EVERY = 4


class CertifiedPolicy(FixedPolicy):
    """A certificate's thresholds, and what the traffic says of it."""

    def __init__(self, certificate: Certificate, drift: DriftMonitor, offset: int) -> None:
        super().__init__(certificate.thresholds, certificate.gate_threshold)
        self.certificate = certificate
        self.drift = drift
        self.compare_every, self.compare_offset = COMPARE_EVERY, offset % COMPARE_EVERY
        self._agreed = self._compared = 0

    def on_compared(self, agreed: int, compared: int) -> None:
        """See `ExitPolicy`."""
        self._agreed += agreed
        self._compared += compared

    def end(self, now: float, tokens: int) -> None:
        """The answer is complete: the drift monitor hears of it."""
        self.drift.update(self._compared - self._agreed, self._compared)
        self._agreed = self._compared = 0


class BudgetPolicy(ExitPolicy):
    """A controller's thresholds; also tells it what work was run.

    Attributes:
        shared: what was learnt from earlier generations of the same budget.
        controller: of this generation: a copy of it from `begin` on, merged into it by `end`.
    """

    def __init__(
        self,
        controller: BudgetController,
        table: PolicyTable,
        cost: CostModel,
        exits: Sequence[int],
        observe_speed: Callable[[float], None],
        times: Callable[[int], RowTimes] | None = None,
    ) -> None:
        """
        Args:
            table: exit and gate thresholds by lambda.
            cost: of the machine: seconds of what was run.
            exits: layers below each.
            observe_speed: is told the machine's factor at the end.
            times: in an engine: what the table's rows take where so many sequences run.
        """
        self.shared = self.controller = controller
        self._table = table
        self._observe_speed = observe_speed
        self.thresholds = (math.inf,) * len(exits)  # until the first step
        self.report: BudgetReport | None = None
        self._cost = cost
        self._exits = tuple(exits)
        self._times = times
        self._load = 0

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int, work: BatchTrace) -> None:
        """See `ExitPolicy`."""
        self.gate_threshold = None  # the gate's own for the token of the prompt's pass
        self.controller = self.shared.fork()
        self.controller.begin(now, prompt_tokens, max_new_tokens)
        run = Work(
            self._exits,
            work.passes,
            reads=work.reads,
            deliberation_rounds=work.deliberation_rounds,
            runs=work.runs,
            prefills=work.prefills,
        )
        self.controller.watch(WorkMeter(self._cost, run))

    def on_load(self, sequences: int) -> None:
        """See `ExitPolicy`."""
        if self._times is not None and sequences != self._load:
            self._load = sequences
            self.controller.expect(self._times(sequences))

    def on_step(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        self.thresholds = self.controller.thresholds(now, tokens)
        self.gate_threshold = self._table.gate_threshold(self.controller.lambda_)

    def end(self, now: float, tokens: int) -> None:
        """The response is complete."""
        self.report = self.controller.end(now, tokens)
        self.shared.merge(self.controller)
        self._observe_speed(self.report.speed)


class ExactPolicy(FixedPolicy):
    """Exact mode within a budget: the model's own thresholds, and an account at the end."""

    def __init__(
        self,
        thresholds: Sequence[float],
        budget: LatencyBudget,
        expected: MemberCosts,
        lengths: LengthPredictor,
        observe: Callable[[float], None],
    ) -> None:
        """`observe` is told the seconds per token over those expected of exact mode."""
        super().__init__(thresholds)
        self.report: BudgetReport | None = None
        self._budget, self._expected, self._lengths = budget, expected, lengths
        self._observe = observe
        self._began = 0.0

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int, work: BatchTrace) -> None:
        """See `ExitPolicy`."""
        self._began = now

    def end(self, now: float, tokens: int) -> None:
        """The response is complete."""
        seconds = max(0.0, now - self._began)
        allowed = self._budget.allowed_seconds(tokens)
        planned = self._expected.prompt + max(0, tokens - 1) * self._expected.exact
        speed = seconds / planned if planned > 0 else 1.0
        self.report = BudgetReport(
            budget=str(self._budget),
            met=seconds <= allowed,
            seconds=seconds,
            tokens=tokens,
            allowed_ms=1e3 * allowed,
            guarded=0,
            lambda_=math.inf,
            speed=speed,
        )
        if tokens >= 1:
            self._lengths.observe(tokens)
        if tokens > 1:
            self._observe(speed)
