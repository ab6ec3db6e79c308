"""The stop policies by name, and the policy of a chain from names and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deliberate.reasoning.answer_probes import (
    AnswerProbes,
    AnswerProbeSettings,
    Same,
    same_text,
)
from deliberate.reasoning.calibrated_bands import CalibratedBands, CalibratedBandsSettings
from deliberate.reasoning.fixed_length import FixedLength, FixedLengthSettings
from deliberate.reasoning.give_up import GiveUp, GiveUpSettings
from deliberate.reasoning.loop_rollback import LoopRollback, LoopRollbackSettings
from deliberate.reasoning.stop_policy import Registered, StopPolicy, Together, settings_of
from deliberate.reasoning.trial_answers import TrialAnswers, TrialAnswerSettings
from deliberate.reasoning.variance import Variance, VarianceSettings

STOP_POLICIES: Mapping[str, Registered] = {
    "probe": Registered(
        AnswerProbeSettings,
        lambda settings, encode, same: AnswerProbes(settings, same),
        "arXiv:2412.20993",
    ),
    "deer": Registered(
        TrialAnswerSettings,
        lambda settings, encode, same: TrialAnswers(settings, encode),
        "arXiv:2504.15895",
    ),
    "bands": Registered(CalibratedBandsSettings, CalibratedBands, "this project"),
    "cut": Registered(
        FixedLengthSettings, lambda settings, encode, same: FixedLength(settings), "this project"
    ),
    "give_up": Registered(
        GiveUpSettings, lambda settings, encode, same: GiveUp(settings), "this project"
    ),
    "rollback": Registered(
        LoopRollbackSettings,
        lambda settings, encode, same: LoopRollback(settings),
        "this project",
        stops=False,
    ),
    "variance": Registered(
        VarianceSettings,
        lambda settings, encode, same: Variance(settings),
        "this project",
        stops=False,
    ),
}


def chain_policy(
    chosen: Mapping[str, Mapping[str, Any] | None],
    encode: Callable[[str], Sequence[int]],
    same: Same = same_text,
) -> StopPolicy:
    """The policy of one chain: those named, together.

    Args:
        chosen: settings by name, None or empty for the defaults, e.g. ``{"probe": {"chunk": 32}}``.
        encode: ids of a text, without special tokens.
        same: whether two answers are equal, as a grader does.

    Raises:
        DeliberateError: an unknown policy or setting.
    """
    built = []
    for name, given in chosen.items():
        settings = settings_of(STOP_POLICIES, name, given)
        built.append(STOP_POLICIES[name].build(settings, encode, same))
    return built[0] if len(built) == 1 else Together(built)
