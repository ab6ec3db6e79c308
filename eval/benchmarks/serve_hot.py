"""The load ``zipf`` of `deliberate bench serve`: the same few prompts again and again, from the
answer cache and decoded each time."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deliberate.eval.benchmarks.serve_client import Client, Run
from deliberate.eval.benchmarks.serve_load import Shot


def drawn(shots: Sequence[Shot], exponent: float, count: int, seed: int) -> list[Shot]:
    """Requests with Zipf's frequencies: the r-th of the prompts with weight r to the -exponent."""
    weights = [rank**-exponent for rank in range(1, len(shots) + 1)]
    return random.Random(seed).choices(shots, weights, k=count)


def told_apart(shots: Sequence[Shot]) -> Iterator[Shot]:
    """The same requests, each with a seed of its own, which a greedy answer does not depend on and
    under which no answer is kept yet."""
    for number, shot in enumerate(shots):
        yield dataclasses.replace(shot, fields={**shot.fields, "seed": number})


@dataclass(frozen=True)
class Hot:
    """What the cache gains.

    Attributes:
        requests, prompts: that were sent, and different ones among them.
        cold, filling, hot: answers a second: all decoded, while the cache fills, and when it has
            all of them.
        differing: requests whose answers in the three runs are not one.
        failed: requests without an answer.
    """

    requests: int
    prompts: int
    cold: float
    filling: float
    hot: float
    differing: int
    failed: int

    def line(self) -> str:
        """All of it, in one line."""
        return (
            f"zipf: {self.requests} requests for {self.prompts} prompts: {self.cold:.1f} a second "
            f"decoded, {self.filling:.1f} while the cache fills "
            f"({self.filling / self.cold:.2f}x), {self.hot:.1f} from the full cache "
            f"({self.hot / self.cold:.2f}x); answers that differ {self.differing}, failed "
            f"{self.failed}"
        )


async def compare(client: Client, sent: Sequence[Shot], clients: int, seconds: float) -> Hot:
    """Sends the same requests three times: told apart, then twice as they are."""
    cold = await _run(client, told_apart(sent), len(sent), clients, seconds)
    filling = await _run(client, iter(sent), len(sent), clients, seconds)
    hot = await _run(client, iter(sent), len(sent), clients, seconds)
    texts: dict[tuple[int, ...], set[str]] = {}
    every = [one for run in (cold, filling, hot) for one in run.outcomes]
    for one in every:
        if one.answered:
            texts.setdefault(one.prompt, set()).add(one.text)
    wrong = {prompt for prompt, own in texts.items() if len(own) > 1}
    return Hot(
        requests=len(sent),
        prompts=len({shot.prompt for shot in sent}),
        cold=_rate(cold),
        filling=_rate(filling),
        hot=_rate(hot),
        differing=sum(shot.prompt in wrong for shot in sent),
        failed=sum(not one.answered for one in every),
    )


async def _run(
    client: Client, shots: Iterator[Shot], count: int, clients: int, seconds: float
) -> Run:
    return await client.closed(itertools.islice(shots, count), clients, count, seconds)


def _rate(run: Run) -> float:
    return sum(one.answered for one in run.outcomes) / run.seconds
