"""The variance trigger: acts where the final hidden states of a chain say that it repeats itself.

The statistic and its constants are those of long texts (`deliberate.engine.long_text`): the part of
the variance in a window of states that earlier states do not explain. Where it falls below the
threshold, the logits of the next tokens are re-weighed, or the chain forks: several continuations
are sampled, and of those that no longer repeat the text the most likely one is kept. Likelihood
alone would choose the repetition, which a language model finds easy to predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deliberate.engine.long_text_config import LongTextConfig
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.stop_policy import (
    Action,
    Branch,
    Continue,
    Fork,
    StopPolicy,
    Trial,
    watched_by,
)
from deliberate.utils.checks import at_least, one_of
from deliberate.utils.errors import DeliberateError

REWEIGH, FORK = "reweigh", "fork"
_ACTIONS = (REWEIGH, FORK)
_MOST_BRANCHES = 16


@dataclass(frozen=True)
class VarianceSettings:
    """What is watched, and what is done where it triggers.

    Attributes:
        action: ``reweigh`` the logits of the next tokens, or ``fork``.
        window: states that the statistic is taken over.
        threshold: unexplained share of the variance below which it triggers.
        tokens: how many are re-weighed from a trigger on, or of each continuation.
        strength: nats that the token after an identical state loses, where it is re-weighed.
        sharpness: how fast that fades: exp(-sharpness * (1 - cosine)).
        branches: continuations of a fork.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    action: str = REWEIGH
    window: int = LongTextConfig.window
    threshold: float = LongTextConfig.threshold
    tokens: int = LongTextConfig.tokens
    strength: float = LongTextConfig.strength
    sharpness: float = LongTextConfig.sharpness
    branches: int = 4

    def __post_init__(self) -> None:
        one_of("variance action", self.action, _ACTIONS)
        at_least("variance branches", self.branches, 2)
        if self.branches > _MOST_BRANCHES:
            raise DeliberateError(
                f"variance branches={self.branches}: {_MOST_BRANCHES} at most, all of which are run"
            )
        self.long_text()

    def long_text(self) -> LongTextConfig:
        """What is watched, and how strongly the chain itself is re-weighed."""
        strength = self.strength if self.action == REWEIGH else 0.0
        return LongTextConfig(self.window, self.threshold, self.tokens, strength, self.sharpness)


class Variance:
    """The trigger on one chain."""

    def __init__(self, settings: VarianceSettings) -> None:
        self.settings = settings
        self.long_text = settings.long_text()
        self._statistic = math.inf
        self._next = 0

    def see(self, statistic: float) -> None:
        """The statistic at the newest token; infinite where it is not known."""
        self._statistic = statistic

    def due(self, tokens: Sequence[int]) -> bool:
        """Where the chain repeats itself, and the newest fork is behind it; never to re-weigh."""
        settings = self.settings
        if settings.action != FORK or len(tokens) < self._next:
            return False
        return self._statistic < settings.threshold

    def on_step(self, tokens: Sequence[int]) -> Action:
        """`Fork`."""
        settings = self.settings
        self._next = len(tokens) + settings.tokens
        return Fork(settings.branches, settings.tokens)

    def on_branches(self, branches: Sequence[Branch]) -> int:
        """The most likely of those that no longer repeat the text, else the farthest from it."""
        numbers = range(len(branches))
        left = [i for i in numbers if branches[i].statistic >= self.settings.threshold]
        if left:
            return max(left, key=lambda i: branches[i].logprob)
        return max(numbers, key=lambda i: branches[i].statistic)

    def on_probe(self, trial: Trial) -> Action:
        """It asks for no probes."""
        return Continue()


def watched_spec(spec: DecodingSpec, policy: StopPolicy | None) -> DecodingSpec:
    """A chain's spec, with what its policy has watched.

    Raises:
        DeliberateError: it is decoded so that there are no states to watch, or watched already.
    """
    rule = watched_by(policy)
    if rule is None:
        return spec
    if spec.long_text is not None:
        raise DeliberateError(
            "long_text with the reasoning policy 'variance', which watches the chain: give one"
        )
    if spec.strict is not False:
        raise DeliberateError(
            f"strict={spec.strict!r} with the reasoning policy 'variance': leave strict out"
        )
    try:
        return replace(spec, long_text=rule)
    except DeliberateError as error:
        raise DeliberateError(f"reasoning policy 'variance': {error}") from None
