"""Variants of decoding a request in the budget sweep: under a budget, and the baselines.

All run at batch 1 in the same process on the same requests, in turn, so that their times compare.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.engine.exit_policy import ExitPolicy, FixedPolicy
from deliberate.engine.exit_rules import RandomPolicy
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetReport
from deliberate.utils.devices import synchronize

Clock = Callable[[], float]


def time_steps(policy: ExitPolicy, seconds: list[float]) -> None:
    """Has a policy's steps timed from now on; the policy is of one generation only."""
    plain = policy.on_step

    def timed(now: float, tokens: int) -> None:
        began = time.perf_counter()
        plain(now, tokens)
        seconds.append(time.perf_counter() - began)

    policy.on_step = timed  # type: ignore[method-assign]


@dataclass(frozen=True)
class Variant:
    """One way of decoding that is compared.

    Attributes:
        name: in tables.
        kind: ``budget``, ``fixed``, ``random``, ``dense`` or ``exact``.
        budget: to hold, for the first.
        exit_policy: sets the thresholds of the baselines with early exits.
    """

    name: str
    kind: str
    budget: LatencyBudget | None = None
    exit_policy: ExitPolicy | None = None


@dataclass(frozen=True)
class Answer:
    """One request decoded in one variant.

    Attributes:
        seconds: from the call to the last token.
        tokens: generated ids.
        report: the controller's, under a budget.
    """

    seconds: float
    tokens: tuple[int, ...]
    report: BudgetReport | None = None

    @property
    def ms_per_token(self) -> float:
        """Mean over the answer, prompt pass included."""
        return 1e3 * self.seconds / max(1, len(self.tokens))


@dataclass
class Overheads:
    """What holding a budget itself takes, in seconds.

    Attributes:
        steps: the controller's decision before each step, with its estimate of the passes' time.
        requests: the check of feasibility before each request.
    """

    steps: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)

    def per_token(self, tokens_per_request: float) -> float:
        """Medians added up for one token; other processes' share of the core is in the tails."""
        if not self.steps:
            return 0.0
        return statistics.median(self.steps) + statistics.median(self.requests) / max(
            1.0, tokens_per_request
        )


def budget_variant(ms_per_token: float) -> Variant:
    """A controller that holds a mean per token."""
    budget = LatencyBudget(ms_per_token=ms_per_token)
    return Variant(f"budget {ms_per_token:.3g} ms", "budget", budget=budget)


def earliest(model: AdaptiveModel) -> Variant:
    """Every token exits at the first exit, those that must catch up excepted."""
    return next(variant for variant in baselines(model, ()) if variant.kind == "fixed")


def baselines(model: AdaptiveModel, probabilities: Sequence[float], seed: int = 0) -> list[Variant]:
    """Dense, exact, every token at one exit, and random exits."""
    exits = model.exit_config.layers
    variants = [Variant("dense", "dense"), Variant("exact", "exact")]
    for k, layer in enumerate(exits):
        row = [0.0 if index == k else math.inf for index in range(len(exits))]
        variants.append(Variant(f"fixed depth {layer}", "fixed", exit_policy=FixedPolicy(row)))
    for number, probability in enumerate(probabilities):
        exit_policy = RandomPolicy(probability, len(exits), seed + number)
        variants.append(Variant(f"random exits {probability:g}", "random", exit_policy=exit_policy))
    return variants


def decode(
    model: AdaptiveModel,
    prompt: Sequence[int],
    variant: Variant,
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    clock: Clock = time.perf_counter,
    overheads: Overheads | None = None,
) -> Answer | None:
    """One request; None where its budget is refused as infeasible before decoding."""
    ids = torch.tensor([list(prompt)], device=model.device)
    fidelity = "threshold" if variant.exit_policy is not None else variant.kind
    decoding = AdaptiveDecoding(
        model, fidelity, exit_policy=variant.exit_policy, latency_budget=variant.budget
    )
    began = clock()
    if variant.budget is not None:
        entered = time.perf_counter()
        found = model.guarantees.feasibility(model, variant.budget, len(prompt), max_new_tokens)
        if overheads is not None:
            overheads.requests.append(time.perf_counter() - entered)
        if not found.feasible:
            return None
    loop = decoding.loop(
        max_new_tokens=max_new_tokens, end_tokens=end_tokens, prompt_tokens=len(prompt)
    )
    loop.stopwatch.clock = clock
    if overheads is not None and variant.budget is not None:
        time_steps(loop.exit_policy, overheads.steps)
    with torch.inference_mode():
        for _ in loop.run(ids):
            pass
    synchronize(model.device)
    seconds = clock() - began
    return Answer(seconds, tuple(loop.trace.tokens), loop.exit_policy.report)
