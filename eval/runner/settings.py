"""The settings of an evaluation run, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deliberate.calibration.certificate import Risk, check_guarantee
from deliberate.data.prompts import CHAT
from deliberate.engine.spec import as_strict
from deliberate.eval.runner.summary import DEFAULT_MODES, MODE_ORDER
from deliberate.eval.runner.together import TOGETHER
from deliberate.policies.budget import LatencyBudget
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class RunSettings:
    """How a task is run.

    Attributes:
        modes: what to run, of `MODE_ORDER`.
        thresholds: least confidence to exit at, one or one per exit; None = the model's own.
        warmup: problems decoded in every mode before any is measured.
        transformers_limit: the transformers baseline on the first so many problems only.
        risk, epsilon, delta: certified mode: which certificate; by default the one of this
            risk with the least cost.
        budget: budget mode: what to hold.
        chat: the tokenizer's chat template: ``auto`` (where there is one), ``always``, ``never``.
        system: system message of every chat.
        strict: exact mode: dense's own passes choose near-ties (`deliberate.engine.strict`).
        max_running: problems that each mode decodes at a time, by an engine; None = one at a time,
            by `generate`, which is what times are measured with.
    """

    modes: tuple[str, ...] = DEFAULT_MODES
    thresholds: float | tuple[float, ...] | None = None
    warmup: int = 2
    transformers_limit: int | None = None
    risk: Risk | str = Risk.ACCURACY
    epsilon: float | None = None
    delta: float | None = None
    budget: LatencyBudget | None = None
    chat: str = "auto"
    system: str | None = None
    strict: bool | float = False
    max_running: int | None = None

    def __post_init__(self) -> None:
        if not self.modes:
            raise DeliberateError(f"modes is empty: name at least one of {', '.join(MODE_ORDER)}")
        for mode in self.modes:
            if mode not in MODE_ORDER:
                raise DeliberateError(f"mode {mode!r} is not one of {', '.join(MODE_ORDER)}")
        if len(set(self.modes)) < len(self.modes):
            raise DeliberateError(f"modes {list(self.modes)} name one twice")
        for name, least in (("warmup", 0), ("transformers_limit", 1), ("max_running", 1)):
            value = getattr(self, name)
            if value is None and name != "warmup":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DeliberateError(f"{name}={value} must be a whole number of at least {least}")
        if self.transformers_limit is not None and self.modes == ("transformers",):
            raise DeliberateError("transformers_limit with transformers alone: use limit instead")
        if self.chat not in CHAT:
            raise DeliberateError(f"chat={self.chat} is not one of {', '.join(CHAT)}")
        if as_strict(self.strict) is not None and "exact" not in self.modes:
            raise DeliberateError(
                f"strict={self.strict} is given, but 'exact' is not one of the modes"
            )
        if self.max_running is not None:
            alone = next((mode for mode in self.modes if mode not in TOGETHER), None)
            if alone is not None or as_strict(self.strict) is not None:
                what = f"mode {alone!r}" if alone is not None else f"strict={self.strict}"
                raise DeliberateError(
                    f"max_running={self.max_running} with {what}: several problems at a time are "
                    f"decoded in the modes {', '.join(TOGETHER)} without strict; leave one out"
                )
        self._check_guarantees()

    def _check_guarantees(self) -> None:
        if self.risk not in list(Risk):
            raise DeliberateError(f"risk={self.risk} is not one of {', '.join(Risk)}")
        for name in ("epsilon", "delta"):
            if getattr(self, name) is None:
                continue
            check_guarantee(**({"epsilon": 0.5, "delta": 0.5} | {name: getattr(self, name)}))
            if "certified" not in self.modes:
                raise DeliberateError(f"{name} is given, but 'certified' is not one of the modes")
        if ("budget" in self.modes) != (self.budget is not None):
            problem = (
                "mode 'budget' needs budget.ms_per_token, budget.deadline_ms or budget.tier"
                if self.budget is None
                else f"a budget ({self.budget}) is given, but 'budget' is not one of the modes"
            )
            raise DeliberateError(problem)

    @property
    def certificate(self) -> Mapping[str, Any] | None:
        """Which certificate; None without certified mode."""
        if "certified" not in self.modes:
            return None
        return {"risk": self.risk, "epsilon": self.epsilon, "delta": self.delta}
