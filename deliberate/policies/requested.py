"""The exit policy that a caller asks for, of the several ways to say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from deliberate.engine.exit_policy import (
    CallablePolicy,
    Decision,
    ExitPolicy,
    FixedPolicy,
    MonitoredPolicy,
)
from deliberate.engine.exit_rules import policy_named
from deliberate.policies.exit_policies import COMPARE_EVERY


def requested_policy(
    policy: ExitPolicy | str | Mapping[str, float] | None,
    decision: Decision | None,
    monitor: Callable[[int, int], None] | None,
    thresholds: Sequence[float],
    measure: str,
) -> ExitPolicy | None:
    """The policy of a generation, None for the thresholds alone.

    Args:
        policy: of the caller or of a guarantee; a name of `EXIT_RULES`, alone or with its setting.
        decision: of the caller: whether a token exits; taken in place of `policy`.
        monitor: of the caller: told of agreement with full depth.
        thresholds: one per exit, where neither of the first two is given.
        measure: of the exits.

    Raises:
        DeliberateError: a name that is not in the table, or a setting that it does not have.
    """
    if isinstance(policy, str | Mapping):
        policy = policy_named(policy, len(thresholds), measure)
    if decision is not None:
        policy = CallablePolicy(decision)
    if monitor is None:
        return policy
    return MonitoredPolicy(policy or FixedPolicy(thresholds), monitor, COMPARE_EVERY)
