"""`deliberate bench swaps`: the live version of a loaded server is swapped again and again.

Versions differ in policy, exits, adapter and weights. Each is live alone first, and its answers to
the questions are kept. Then clients ask the same questions, half of them streamed, while versions
change: every answer names its version and must be, token for token, what that version says alone.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from deliberate.data import seeds
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.server_process import served
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.benchmarks.swap_versions import Variant, make_variants
from deliberate.installation import install_extra
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

_MOST_NOTES = 20
# Prompts of random tokens, of which those are kept that the versions answer differently.
_PROMPT_TOKENS = 12
_TRIED = 6
_REASON = {"reason": "bench swaps"}
# What a version says: its text and the layers after which its tokens were chosen.
Said = tuple[str, tuple[int, ...]]


@dataclass
class SwapCounts:
    """What happened.

    Attributes:
        answered, streamed, failed: requests under swaps.
        mixed: answers that are not what the version that they name says alone.
        stale: answers of a version that had been swapped out before they were asked for.
        swaps: by kind of the version that was swapped in.
        swaps_failed: were not done.
        versions: versions that answered.
        seconds: that each swap took, its version loaded and prepared.
        longest: seconds of the slowest answer.
        notes: the first failures, in a line each.
    """

    answered: int = 0
    streamed: int = 0
    failed: int = 0
    mixed: int = 0
    stale: int = 0
    swaps: Counter[str] = field(default_factory=Counter)
    swaps_failed: int = 0
    versions: set[int] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    longest: float = 0.0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keeps a line, up to some number of them."""
        self.notes = [*self.notes, text][:_MOST_NOTES]

    def line(self) -> str:
        """All of it, in one line."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.swaps.items()))
        middle = statistics.median(self.seconds) if self.seconds else 0.0
        return (
            f"{sum(self.swaps.values())} swaps ({kinds}; {self.swaps_failed} failed; "
            f"{middle:.2f} s in the median): {self.answered} answers of {len(self.versions)} "
            f"versions, {self.streamed} of them streamed, {self.failed} failed, {self.mixed} "
            f"mixed, {self.stale} stale; the slowest took {self.longest:.2f} s"
        )

    @property
    def wrong(self) -> bool:
        """Whether anything is not as it must be."""
        return bool(self.failed or self.mixed or self.stale or self.swaps_failed)


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench swaps`` with overrides of `configs/bench_swaps.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or an answer or a swap was wrong.
    """
    cfg = bench_config("bench_swaps", arguments, verbatim=("model", "out"))
    all_at_least(cfg, {"clients": 1, "swaps": 1, "questions": 1, "max_tokens": 1, "threads": 1})
    for name in ("noise", "timeout"):
        if not cfg[name] > 0:
            raise DeliberateError(f"{name}={cfg[name]} must be a number above 0")
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise DeliberateError(f"bench swaps needs {error.name}: {install_extra('serve')}") from None
    session = Session("swaps", arguments, cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(str(cfg.model), Path(folder), cfg.seed, cfg.noise)
        options = ["--registry", str(Path(folder) / "registry"), *map(str, cfg.serve_options)]
        with served(str(cfg.model), options, executor=str(cfg.executor), threads=cfg.threads) as (
            url,
            _,
        ):
            counts = asyncio.run(swap_under_load(cfg, url, variants))
    session.end()
    console = table_console()
    for note in counts.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(counts.line(), soft_wrap=True, highlight=False)
    console.print(session.line())
    record = asdict(counts) | {"versions": sorted(counts.versions), "swaps": dict(counts.swaps)}
    session.write(cfg.out, {"settings": OmegaConf.to_container(cfg), **record})
    if counts.wrong:
        raise DeliberateError(f"swaps: {counts.line()}")


async def swap_under_load(cfg: DictConfig, url: str, variants: Sequence[Variant]) -> SwapCounts:
    """Swaps between the versions of a server while clients ask it.

    Raises:
        DeliberateError: a version cannot be made live, or too few questions tell versions apart.
    """
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=cfg.timeout, limits=limits, trust_env=False
    ) as http:
        swapping = Swapping(cfg, http, variants)
        await swapping.learn()
        return await swapping.run()


class Swapping:
    """One run on one server: `learn`, then `run`.

    Args:
        cfg: as of `configs/bench_swaps.yaml`.
        http: client of the server.
        variants: that are swapped, in turn.
    """

    def __init__(self, cfg: DictConfig, http: Any, variants: Sequence[Variant]) -> None:
        self._cfg, self._http, self._variants = cfg, http, variants
        self._counts = SwapCounts()
        self._alone: dict[tuple[int, int], Said] = {}
        self._prompts: list[list[int]] = []
        # Which variant a version of the registry is.
        self._which: dict[int, int] = {}
        self._live = 0

    async def learn(self) -> None:
        """What each version says alone, and which questions tell them apart."""
        own = seeds.WORD_PROBLEMS[seeds.SERVING_BENCHMARK]
        draw = torch.Generator().manual_seed(own.of(self._cfg.seed, seeds.SERVING_BENCHMARK))
        size = (_TRIED * self._cfg.questions, _PROMPT_TOKENS)
        tried = torch.randint(5, self._cfg.vocabulary, size, generator=draw).tolist()
        self._prompts = tried
        for index, variant in enumerate(self._variants):
            error = await self._swap(index)
            if error is not None:
                raise DeliberateError(f"a version of kind {variant.kind} cannot be live: {error}")
            for number in range(len(tried)):
                version, said = await self._ask(number, stream=False)
                assert version is not None
                self._alone[index, number] = said
        everyone = range(len(self._variants))
        apart = [
            number
            for number in range(len(tried))
            if len({self._alone[index, number][0] for index in everyone}) == len(self._variants)
        ]
        if len(apart) < self._cfg.questions:
            raise DeliberateError(
                f"{len(apart)} of {len(tried)} questions are answered differently by all versions; "
                f"questions={self._cfg.questions}: raise noise or max_tokens"
            )
        self._prompts = [tried[number] for number in apart]
        self._alone = {
            (index, place): self._alone[index, number]
            for index in everyone
            for place, number in enumerate(apart)
        }
        self._counts = SwapCounts()

    async def run(self) -> SwapCounts:
        """The swaps and the load."""
        over = asyncio.Event()

        async def client(number: int) -> None:
            while not over.is_set():
                await self._check(number % len(self._prompts), stream=number % 2 == 0)
                number += 1

        clients = [asyncio.create_task(client(7 * n)) for n in range(self._cfg.clients)]
        try:
            for count in range(self._cfg.swaps):
                before = self._counts.answered
                error = await self._swap(count % len(self._variants))
                if error is not None:
                    self._counts.swaps_failed += 1
                    self._counts.note(f"swap {count}: {error}")
                # Each version is asked something before the next one comes.
                waited = time.monotonic() + self._cfg.timeout
                while self._counts.answered <= before and time.monotonic() < waited:
                    await asyncio.sleep(0.01)
        finally:
            over.set()
            await asyncio.gather(*clients)
        return self._counts

    async def _swap(self, index: int) -> str | None:
        """Makes a version live; why that failed, or None."""
        began, variant = time.perf_counter(), self._variants[index]
        proposed = await self._http.post("/admin/versions", json=variant.changes | _REASON)
        if proposed.status_code != 200:
            return f"status {proposed.status_code}: {proposed.text[:200]}"
        number = int(proposed.json()["id"])
        self._which[number] = index
        done = await self._http.post(f"/admin/versions/{number}/promote", json=_REASON)
        if done.status_code != 200:
            return f"status {done.status_code}: {done.text[:200]}"
        self._live = number
        self._counts.swaps[variant.kind] += 1
        self._counts.seconds.append(time.perf_counter() - began)
        return None

    async def _check(self, number: int, *, stream: bool) -> None:
        counts, live, began = self._counts, self._live, time.perf_counter()
        try:
            version, said = await self._ask(number, stream=stream)
        except Exception as error:  # of whatever kind: it is what is counted
            counts.failed += 1
            counts.note(f"{type(error).__name__}: {error}"[:300])
            return
        counts.longest = max(counts.longest, time.perf_counter() - began)
        counts.answered += 1
        counts.streamed += stream
        counts.versions.add(version)
        counts.stale += version < live
        if said != self._alone[self._which[version], number]:
            counts.mixed += 1
            counts.note(f"version {version} is said to have answered {said[0]!r}"[:300])

    async def _ask(self, number: int, *, stream: bool) -> tuple[int, Said]:
        """Version and answer.

        Raises:
            DeliberateError: it was not answered, or not to its end.
        """
        body = {
            "model": self._cfg.model,
            "prompt": self._prompts[number],
            "max_tokens": self._cfg.max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        answer = await self._http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise DeliberateError(f"status {answer.status_code}: {answer.text[:200]}")
        events = [answer.text]
        if stream:
            lines = answer.text.splitlines()
            events = [line[6:] for line in lines if line.startswith("data: {")]
            if "data: [DONE]" not in lines:
                raise DeliberateError(f"the stream broke off: {answer.text[-200:]}")
        read = [parse_json(one, "an answer") for one in events]
        facts = read[-1]["deliberate"]
        text = "".join(choice["text"] for one in read for choice in one["choices"])
        return int(facts["version"]), (text, tuple(facts["exit_layers"][0]))
