"""The usual early-exit rules, one table entry each: exit policies by name, with one setting.

`generate(..., exit_policy="patience")` runs a rule online; `deliberate.calibration.baselines`
replays the same policies on recorded traces. A rule of one's own is one more entry of `EXIT_RULES`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deliberate.engine.exit_policy import ExitPolicy, ExitReading, FixedPolicy
from deliberate.trace import BatchTrace
from deliberate.utils.errors import DeliberateError

PUBLISHED_LOW, PUBLISHED_HIGH = 0.85, 0.95
CALM_TEMPERATURE = 4.0

# 1 - threshold, from never (0) to always (1): even steps in the log of what is missing to 1.
_DOUBTS = (0.0, *(float(doubt) for doubt in np.geomspace(1e-6, 1.0, 121)))


@dataclass(frozen=True)
class ExitRule:
    """A family of exit policies with one setting.

    Attributes:
        name: in `EXIT_RULES` and in ``exit_policy=``.
        title: in tables.
        meaning: of the setting, for errors.
        policy: from the setting and the number of exits to a policy of one generation.
        settings: from the number of exits to the settings that are compared.
        default: the setting where only the name is given.
        highest: the largest setting, from the number of exits; the least is that of `settings`.
        whole: the setting is a whole number.
        measure: confidence measure that the rule is for; None for any.
        similarities: the policy reads `ExitReading.similarities`.
        shares: of a policy that draws at random: the probabilities of exiting at each exit and at
            full depth, ``[K + 1]``, from the setting and the number of exits.
    """

    name: str
    title: str
    meaning: str
    policy: Callable[[float, int], ExitPolicy]
    settings: Callable[[int], Sequence[float]]
    default: float
    highest: Callable[[int], float] = lambda _exits: 1.0
    whole: bool = False
    measure: str | None = None
    similarities: bool = False
    shares: Callable[[float, int], Sequence[float]] | None = None

    def checked(self, setting: float, exits: int) -> float:
        """The setting, if the rule has it.

        Raises:
            DeliberateError: not a number within the range, or not a whole one.
        """
        low, high = min(self.settings(exits)), self.highest(exits)
        number = isinstance(setting, int | float) and not isinstance(setting, bool)
        if not number or not low <= setting <= high or (self.whole and setting != int(setting)):
            kind = "a whole number" if self.whole else "a number"
            raise DeliberateError(
                f"exit_policy={{{self.name!r}: {setting!r}}}: {self.meaning} must be {kind} from "
                f"{low:g} to {high:g}"
            )
        return float(setting)


class DecayingPolicy(ExitPolicy):
    """CALM (Schuster et al., NeurIPS 2022, eq. 5): stricter at first, then ever laxer.

    threshold(t) = 0.9 * level + 0.1 * exp(-4 t / N), within [0, 1], with t the tokens of the
    longest sequence so far and N the most that there may be.
    """

    def __init__(self, doubt: float, exits: int) -> None:
        """`doubt`: 1 - level, in [0, 1]; at 0 no token exits."""
        self._doubt, self._exits = doubt, exits
        self._limit = 1
        self.thresholds = (math.inf,) * exits

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int, work: BatchTrace) -> None:
        """See `ExitPolicy`."""
        self._limit = max_new_tokens

    def on_step(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        if self._doubt > 0:
            decay = math.exp(-CALM_TEMPERATURE * tokens / self._limit)
            level = 0.9 * (1.0 - self._doubt) + 0.1 * decay
            self.thresholds = (min(1.0, max(0.0, level)),) * self._exits


class PatiencePolicy(ExitPolicy):
    """PABEE (Zhou et al., NeurIPS 2020): exit once `count` exits in a row predict one token."""

    constant = True
    keeps_answers = True

    def __init__(self, count: int) -> None:
        self._count = count

    def decide(self, reading: ExitReading) -> Sequence[bool]:
        """See `ExitPolicy`."""
        if reading.exit + 1 < self._count:
            return [False] * len(reading)
        if self._count <= 1:
            return [True] * len(reading)
        below = range(reading.exit - self._count + 1, reading.exit)
        return [
            all(k in earlier and earlier[k].token == token for k in below)
            for token, earlier in zip(reading.tokens, reading.earlier, strict=True)
        ]


class SimilarityPolicy(ExitPolicy):
    """CALM's hidden-state saturation (Schuster et al., NeurIPS 2022, section 3.5).

    A token exits once the hidden states of two exits in a row are nearly parallel. The first exit
    has none below it, so no token exits there.
    """

    constant = True
    keeps_answers = True

    def __init__(self, doubt: float) -> None:
        """`doubt`: 1 - the least cosine similarity to exit at, in [0, 2]."""
        self._least = 1.0 - doubt

    def decide(self, reading: ExitReading) -> Sequence[bool]:
        """See `ExitPolicy`."""
        if reading.exit == 0:
            return [False] * len(reading)
        return [similarity >= self._least for similarity in reading.similarities]


class RandomPolicy(ExitPolicy):
    """Draws where the next token exits: at each exit with the same probability.

    Only the exit that is drawn is evaluated: the draw needs no confidence.
    """

    def __init__(self, probability: float, exits: int, seed: int = 0) -> None:
        """`probability`: in [0, 1]."""
        if not 0.0 <= probability <= 1.0:
            raise DeliberateError(f"random exits: probability {probability} is outside [0, 1]")
        self._probability, self._exits = probability, exits
        self._random = random.Random(seed)
        self.thresholds = (math.inf,) * exits

    def on_step(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        chosen = [math.inf] * self._exits
        for k in range(self._exits):
            if self._random.random() < self._probability:
                chosen[k] = 0.0
                break
        self.thresholds = tuple(chosen)


def published_thresholds(exits: int) -> tuple[float, ...]:
    """0.85, 0.90, 0.95 for three exits; for other counts evenly from 0.85 to 0.95."""
    return tuple(float(t) for t in np.linspace(PUBLISHED_LOW, PUBLISHED_HIGH, exits))


def _constant(doubt: float, exits: int) -> ExitPolicy:
    # A doubt of 0 is "never": a confidence may be 1 by rounding.
    return FixedPolicy((math.inf if doubt == 0 else 1.0 - doubt,) * exits)


def _rising(doubt: float, exits: int) -> ExitPolicy:
    """The published thresholds at doubt = 0.15 (0.85 / 0.90 / 0.95), their doubts in proportion."""
    if doubt == 0:
        return _constant(0.0, exits)
    shape = 1.0 - np.asarray(published_thresholds(exits))
    return FixedPolicy((1.0 - doubt * shape / shape[0]).tolist())


def _fixed_depth(exit_index: float, exits: int) -> ExitPolicy:
    return FixedPolicy([0.0 if k == exit_index else math.inf for k in range(exits)])


def _random_shares(rate: float, exits: int) -> list[float]:
    return [*(rate * (1.0 - rate) ** k for k in range(exits)), (1.0 - rate) ** exits]


_DOUBT = "1 - the threshold"
EXIT_RULES: dict[str, ExitRule] = {
    rule.name: rule
    for rule in (
        ExitRule("constant", "constant threshold", _DOUBT, _constant, lambda _: _DOUBTS, 0.1),
        ExitRule(
            "rising", "rising with depth", "1 - the first exit's threshold",
            _rising, lambda _: _DOUBTS, 0.15,
        ),
        ExitRule(
            "decaying", "decaying (CALM)", "1 - the threshold's level",
            DecayingPolicy, lambda _: _DOUBTS, 0.1,
        ),
        ExitRule(
            "entropy", "entropy", _DOUBT, _constant, lambda _: _DOUBTS, 0.1, measure="entropy",
        ),
        ExitRule(
            "patience", "patience", "exits in a row that predict one token",
            lambda count, _exits: PatiencePolicy(int(count)),
            lambda exits: tuple(float(n) for n in range(1, exits + 2)), 2.0,
            highest=lambda exits: exits + 1.0, whole=True,
        ),
        ExitRule(
            "similarity", "hidden-state similarity (CALM)", "1 - the least cosine similarity",
            lambda doubt, _exits: SimilarityPolicy(doubt),
            lambda _: _DOUBTS, 0.05, highest=lambda _exits: 2.0, similarities=True,
        ),
        ExitRule(
            "fixed_depth", "fixed depth", "the exit's index",
            _fixed_depth, lambda exits: tuple(float(k) for k in range(exits + 1)), 0.0,
            highest=float, whole=True,
        ),
        ExitRule(
            "random", "random exits", "the probability at each exit",
            RandomPolicy, lambda _: tuple(np.linspace(0.0, 1.0, 21).tolist()), 0.5,
            shares=_random_shares,
        ),
    )
}  # fmt: skip


def policy_named(
    wanted: str | Mapping[str, float], exits: int, measure: str | None = None
) -> ExitPolicy:
    """A policy of the table: ``"patience"``, or ``{"patience": 3}`` with its setting.

    Args:
        exits: how many the model has.
        measure: the exits' confidence measure; None does not check it.

    Raises:
        DeliberateError: an unknown name, more than one, a setting outside its range, or a rule for
            another measure.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if len(names) != 1 or names[0] not in EXIT_RULES:
        raise DeliberateError(
            f"exit_policy={wanted!r}: give one of {', '.join(EXIT_RULES)}, or one with its "
            "setting, as in {'patience': 2}"
        )
    rule = EXIT_RULES[names[0]]
    if None not in (measure, rule.measure) and measure != rule.measure:
        raise DeliberateError(
            f"exit_policy={wanted!r}: the exits' measure is {measure!r}, the rule is for "
            f"{rule.measure!r}; set exits.measure, or use 'constant'"
        )
    setting = rule.default if isinstance(wanted, str) else wanted[names[0]]
    return rule.policy(rule.checked(setting, exits), exits)
