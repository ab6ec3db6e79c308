"""The loads ``tiers`` and ``burst`` of `deliberate bench serve`: who comes when, what is due."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.eval.benchmarks.serve_client import Outcome, Run
from deliberate.eval.benchmarks.serve_load import Shot

# Seconds after which the scheduler ``feedback`` lets nobody of the same priority overtake.
OVERTAKEN = 5.0


@dataclass(frozen=True)
class Tier:
    """A kind of request.

    Attributes:
        name: of it.
        share: of the requests.
        max_tokens: of its answers.
        deadline_ms: None for none.
        service_tier: as OpenAI names it; None for none.
    """

    name: str
    share: float
    max_tokens: int
    deadline_ms: float | None = None
    service_tier: str | None = None


# As `deliberate.eval.benchmarks.schedulers` mixes them: three deadlines, people who read along, and
# batch work.
TIERS = (
    Tier("L1", 0.2, 4, 50.0),
    Tier("L2", 0.2, 16, 200.0),
    Tier("L3", 0.2, 64, 1000.0),
    Tier("interactive", 0.2, 32, None, "priority"),
    Tier("batch", 0.2, 128, None, "flex"),
)


def mixed(source: Iterator[Shot], seed: int, tiers: Sequence[Tier] = TIERS) -> Iterator[Shot]:
    """Requests of the tiers by their shares, with the prompts of `source`."""
    rng, weights = random.Random(seed), [one.share for one in tiers]
    for shot in source:
        tier = rng.choices(tiers, weights)[0]
        given: dict[str, Any] = {}
        if tier.service_tier is not None:
            given["service_tier"] = tier.service_tier
        yield dataclasses.replace(
            shot,
            kind=tier.name,
            max_tokens=tier.max_tokens,
            deadline_ms=tier.deadline_ms,
            fields=given,
        )


def tiers_line(run: Run) -> str:
    """Whether the admitted deadlines were kept, and how long batch work had to wait."""
    dated = [one for one in run.outcomes if one.deadline_ms is not None]
    admitted = [one for one in dated if one.answered]
    kept = sum(one.good for one in admitted)
    waits = [one.first for one in run.outcomes if one.kind == "batch" and one.first is not None]
    share = f"{100 * kept / len(admitted):.1f} %" if admitted else "none"
    wait = f"{max(waits):.2f} s" if waits else "none"
    tiers = "; ".join(_tier(name, own) for name, own in _by_kind(dated).items())
    return (
        f"tiers: {len(admitted)} of {len(dated)} requests with deadlines admitted, {share} of them "
        f"in time ({tiers}); longest wait of batch work for its first token {wait} (overtaken for "
        f"{OVERTAKEN:g} s at most)"
    )


def _by_kind(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.kind, []).append(one)
    return dict(sorted(found.items()))


def _tier(name: str, outcomes: Sequence[Outcome]) -> str:
    """One tier: what was admitted, and kept by the client's clock and by the server's, which cannot
    see how long the client takes to read."""
    admitted = [one for one in outcomes if one.answered]
    if not admitted:
        return f"{name} 0 of {len(outcomes)}"
    kept = 100 * sum(one.good for one in admitted) / len(admitted)
    said = 100 * sum(one.met is True for one in admitted) / len(admitted)
    return (
        f"{name} {len(admitted)} of {len(outcomes)}, {kept:.1f} % in time, {said:.1f} % by the "
        "server's clock"
    )


def burst(
    source: Iterator[Shot], rate: float, factor: float, seconds: float, seed: int
) -> list[Shot]:
    """Poisson arrivals at `rate` a second, at `factor` times that in the second third of the time,
    and at `rate` again."""
    rng, now, made = random.Random(seed), 0.0, []
    while now < seconds:
        made.append(dataclasses.replace(next(source), arrival=now))
        middle = seconds / 3 <= now < 2 * seconds / 3
        now += rng.expovariate(rate * factor if middle else rate)
    return made


def thirds(run: Run, seconds: float) -> list[Run]:
    """The outcomes of a burst by the third in which they were due."""
    parts: list[list[Outcome]] = [[], [], []]
    for one in run.outcomes:
        parts[min(2, int(3 * one.due / seconds))].append(one)
    return [Run(own, seconds / 3) for own in parts]


def completed_per_second(run: Run, first: float, last: float) -> float:
    """Answers that ended between two seconds of a load, a second."""
    ended = [one.due + one.seconds for one in run.outcomes if one.answered]
    return sum(first <= one < last for one in ended) / (last - first)


def burst_line(run: Run, seconds: float, capacity: float) -> str:
    """Throughput while more comes than can be answered, against the capacity."""
    during = completed_per_second(run, seconds / 3, 2 * seconds / 3)
    failed = sum(not one.answered and not one.refused for one in run.outcomes)
    return (
        f"burst: {during:.1f} answers a second through it, {100 * during / capacity:.0f} % of the "
        f"capacity of {capacity:.1f}; failed {failed}"
    )
