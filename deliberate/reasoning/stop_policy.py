"""Stop policies: at which token a chain of reasoning ends, goes on, or is probed for its answer.

A chain is the reasoning part of an output, before its answer. A policy sees the chain's tokens and
the answers of its probes and returns an action; it runs no model, so the same object decides on
scripted chains, on recorded ones and in the engine (`deliberate.reasoning.chain_runner`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deliberate.engine.long_text_config import LongTextConfig
from deliberate.utils.checks import settings_given
from deliberate.utils.errors import DeliberateError

# More tokens than an output has.
_ALWAYS = 1 << 30


@dataclass(frozen=True)
class Continue:
    """The chain goes on."""


@dataclass(frozen=True)
class Stop:
    """The chain ends here, and the answer follows.

    Attributes:
        reason: for the trace, such as ``probes agree``.
        gave_up: the chain would not have finished; its answer is marked so.
    """

    reason: str
    gave_up: bool = False


@dataclass(frozen=True)
class Force:
    """The chain goes on with these tokens; they count as its own."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Rollback:
    """The chain goes back, and on from there another way.

    Attributes:
        count: tokens that are removed, of its reasoning.
        avoid: ids that the reasoning must not hold in a row from now on; the last of them is the
            first token removed.
    """

    count: int
    avoid: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.count < 1 or not self.avoid:
            raise DeliberateError(
                f"Rollback({self.count}, {self.avoid}): remove a token, avoid a run"
            )


@dataclass(frozen=True)
class Probe:
    """A fork of the chain is made to answer now, greedily.

    Attributes:
        max_new_tokens: of the answer.
    """

    max_new_tokens: int


@dataclass(frozen=True)
class Fork:
    """Several continuations of the chain are sampled from here, and one of them is kept.

    Attributes:
        branches: how many.
        tokens: of each.
    """

    branches: int
    tokens: int


Action = Continue | Stop | Force | Rollback | Fork | Probe


@dataclass(frozen=True)
class Branch:
    """One of several continuations.

    Attributes:
        tokens: ids.
        logprob: mean log-probability of its tokens at full depth, in nats.
        statistic: unexplained share of the variance at its last token.
    """

    tokens: tuple[int, ...]
    logprob: float
    statistic: float


@dataclass(frozen=True)
class Trial:
    """What a probe answered.

    Attributes:
        text: the answer, without the text that forced it.
        tokens: its ids.
        probabilities: of each of its tokens at full depth, in [0, 1]; empty where not measured.
    """

    text: str
    tokens: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Quiet:
    """For how long a policy is not going to be due, so that several tokens can be decoded at once.

    Attributes:
        count: it is not due after any of so many tokens that come next.
        ends: then it may be due where the newest token is one of these.
        most: after so many tokens it may be due after any token; None: it stays with `ends`.
    """

    count: int = 0
    ends: frozenset[int] = frozenset()
    most: int | None = None

    @classmethod
    def for_tokens(cls, count: int) -> Quiet:
        """For so many tokens, and then it may be due after any."""
        return cls(count, most=count)


class StopPolicy(Protocol):
    """Decides along one chain; made anew for each.

    A policy may have an attribute `doubtful`: while it is False, the end of the chain is not put
    off, whatever extensions the budget has. It may have a method ``quiet(tokens) -> Quiet``: its
    chain is then decoded in longer runs; without it every token is looked at as it is made. One
    that forks has ``on_branches(branches) -> int``, the number of the one to keep. One that reads
    the final hidden states has ``long_text``, what is watched (`LongTextConfig`), and may have
    ``see(statistic)``, called before `due` with the statistic at the newest token.
    """

    def due(self, tokens: Sequence[int]) -> bool:
        """Whether `on_step` is to be called after the last of these tokens of the chain."""
        ...

    def on_step(self, tokens: Sequence[int]) -> Action:
        """The action after these tokens of the chain."""
        ...

    def on_probe(self, trial: Trial) -> Action:
        """The action after a probe has answered; not another `Probe`."""
        ...


def watched_by(policy: StopPolicy | None) -> LongTextConfig | None:
    """What a policy has watched in the final hidden states; None: nothing."""
    return getattr(policy, "long_text", None)


def show(policy: StopPolicy, statistic: float) -> None:
    """Tells a policy that reads the states of the statistic at the newest token."""
    see: Callable[[float], None] | None = getattr(policy, "see", None)
    if see is not None:
        see(statistic)


def quiet_after(policy: StopPolicy | None, tokens: Sequence[int]) -> Quiet | None:
    """How long a policy is quiet after these tokens of its chain; None where it does not say."""
    if policy is None:
        return Quiet(_ALWAYS)
    said: Callable[[Sequence[int]], Quiet | None] | None = getattr(policy, "quiet", None)
    return None if said is None else said(tokens)


def until_multiple(size: int, every: int) -> int:
    """Tokens that may follow `size` before their number is a multiple of `every` again."""
    return every - 1 - size % every


class Together:
    """Several policies on one chain: each acts at its own tokens.

    Where two act at the same token, a `Stop` comes before a `Force`, a `Rollback`, a `Fork` and a
    `Probe`, in this order; of two probes the one of the earlier policy is run.
    """

    def __init__(self, policies: Sequence[StopPolicy]) -> None:
        self._policies = tuple(policies)
        self._prober: StopPolicy | None = None
        self._forker: Any = None

    @property
    def long_text(self) -> LongTextConfig | None:
        """What the policy that reads states has watched."""
        return next(filter(None, map(watched_by, self._policies)), None)

    def see(self, statistic: float) -> None:
        """Tells the policies that read states."""
        for policy in self._policies:
            show(policy, statistic)

    @property
    def doubtful(self) -> bool:
        """Whether no policy holds against putting off the end of the chain."""
        return all(getattr(policy, "doubtful", True) for policy in self._policies)

    def quiet(self, tokens: Sequence[int]) -> Quiet | None:
        """As long as all are; None where one of the policies does not say."""
        said = [quiet_after(policy, tokens) for policy in self._policies]
        own = [one for one in said if one is not None]
        if len(own) < len(said) or not own:
            return None
        return Quiet(
            min(one.count for one in own),
            frozenset().union(*(one.ends for one in own)),
            min((one.most for one in own if one.most is not None), default=None),
        )

    def due(self, tokens: Sequence[int]) -> bool:
        """Whether any is due."""
        return any(policy.due(tokens) for policy in self._policies)

    def on_step(self, tokens: Sequence[int]) -> Action:
        """The action of the policies that are due."""
        actions = [(p, p.on_step(tokens)) for p in self._policies if p.due(tokens)]
        for kind in (Stop, Force, Rollback, Fork, Probe):
            for policy, action in actions:
                if isinstance(action, kind):
                    self._prober = policy if kind is Probe else None
                    self._forker = policy if kind is Fork else None
                    return action
        return Continue()

    def on_branches(self, branches: Sequence[Branch]) -> int:
        """The choice of the policy that forked."""
        return int(self._forker.on_branches(branches))

    def on_probe(self, trial: Trial) -> Action:
        """The action of the policy that asked for the probe."""
        return Continue() if self._prober is None else self._prober.on_probe(trial)


@dataclass(frozen=True)
class Registered:
    """A policy by name.

    Attributes:
        settings: a frozen dataclass with the source's constants as defaults.
        build: makes the policy of one chain from its settings, the ids of texts (`encode`) and the
            equality of answers.
        source: the paper or system.
        stops: whether it ends chains; else it changes how they go on, and a chain that is cut at
            a fixed length is no control of it.
    """

    settings: type[Any]
    build: Callable[[Any, Callable[[str], Sequence[int]], Callable[[str, str], bool]], StopPolicy]
    source: str
    stops: bool = True


def settings_of(
    registry: Mapping[str, Registered], name: str, given: Mapping[str, Any] | None = None
) -> Any:
    """The settings of a registered policy, with `given` in place of defaults.

    Raises:
        DeliberateError: an unknown policy or setting, or a value that is not allowed.
    """
    if name not in registry:
        raise DeliberateError(f"reasoning policy {name!r} is unknown: use {', '.join(registry)}")
    kind = registry[name].settings
    return kind(**settings_given(f"reasoning policy {name!r}", kind, given))
