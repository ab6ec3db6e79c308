"""The variants of an evaluation of reasoning: a stop policy and a vote each, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deliberate.reasoning.registry import STOP_POLICIES
from deliberate.reasoning.settings import ReasoningSettings, VoteGroup
from deliberate.reasoning.votes import FixedVotes, VoteRule
from deliberate.utils.checks import one_of
from deliberate.utils.errors import DeliberateError

FIDELITIES = ("dense", "exact", "threshold")


@dataclass(frozen=True)
class Variant:
    """One way to reason about a problem.

    Attributes:
        name: in tables.
        settings: where a chain stops, and its limits.
        votes: None: one greedy chain.
        fidelity: how its chains are decoded; None: as all are.
        control_of: the variant that this one has the mean compute of, at a fixed length or number.
    """

    name: str
    settings: ReasoningSettings
    votes: VoteGroup | None = None
    fidelity: str | None = None
    control_of: str | None = None

    @property
    def rule(self) -> VoteRule | None:
        """Of the vote."""
        return None if self.votes is None else self.votes.rule


def _label(given: Any) -> str:
    """``probe chunk=32`` of ``{probe: {chunk: 32}}``."""
    if not isinstance(given, Mapping):
        return str(given)
    parts = []
    for name, value in given.items():
        if isinstance(value, Mapping):
            parts.append(" ".join([str(name), *(f"{key}={one}" for key, one in value.items())]))
        else:
            parts.append(str(name) if value is None else f"{name}={value}")
    return " + ".join(parts)


def variants(
    reasoning: Sequence[Any], samples: Sequence[Any], tags: Sequence[str] | None = None
) -> list[Variant]:
    """Every stop policy with every vote; the first is the baseline of all.

    Args:
        reasoning: each as `ReasoningSettings.of` takes it; a mapping may also have a `fidelity`.
        samples: each as `VoteGroup.of` takes it; 1 is one greedy chain.
        tags: of the model's reasoning, where it does not name them itself.

    Raises:
        DeliberateError: none, one twice, or one that cannot be read.
    """
    if not reasoning or not samples:
        raise DeliberateError("reasoning and samples need a value each, e.g. [none] and [1]")
    made = []
    for own in reasoning:
        fidelity = None
        named = own
        if isinstance(own, Mapping) and "fidelity" in own:
            fidelity = str(own["fidelity"])
            one_of("fidelity", fidelity, FIDELITIES)
            own = {key: value for key, value in own.items() if key != "fidelity"}
        settings = ReasoningSettings.of(own)
        if tags is not None and settings.tags is None:
            settings = replace(settings, tags=(str(tags[0]), str(tags[1])))
        for given in samples:
            single = given == 1
            label = _label(named) if single else f"{_label(named)}, {_label(given)} chains"
            votes = None if single else VoteGroup.of(given)
            made.append(Variant(label, settings, votes, fidelity))
    names = [one.name for one in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DeliberateError(f"reasoning and samples name {twice!r} twice: give it once")
    return made


def control_of(variant: Variant, tokens: float, chains: float) -> Variant | None:
    """A variant of the same mean compute without a rule that decides; None where no rule ends
    chains or votes.

    Args:
        variant: with a policy or a rule.
        tokens: of reasoning of its chains, in the mean.
        chains: of its votes, in the mean.
    """
    settings, votes = variant.settings, variant.votes
    words = []
    if any(STOP_POLICIES[name].stops for name in settings.policies):
        length = max(1, round(tokens))
        settings = replace(settings, policies={"cut": {"tokens": length}})
        words.append(f"cut at {length}")
    if votes is not None and not isinstance(votes.rule, FixedVotes):
        number = max(1, round(chains))
        votes = VoteGroup(FixedVotes(number))
        words.append(f"{number} chains")
    if not words:
        return None
    name = f"{' and '.join(words)}, the compute of {variant.name}"
    return Variant(name, settings, votes, variant.fidelity, variant.name)
