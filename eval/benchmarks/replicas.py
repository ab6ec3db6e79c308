"""`deliberate bench replicas`: what a second replica gives, and what a killed one costs.

Two servers of `deliberate serve --replicas` run side by side, one with one replica. The same load
goes to them in turn, so that a change of the machine's speed meets both. Then replicas of the
larger one are killed while clients ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from deliberate.data.prompts import PROMPT
from deliberate.data.word_problems import word_problems
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.replica_costs import (
    RequestCosts,
    highest_efficiency,
    processor_seconds,
)
from deliberate.eval.benchmarks.server_process import served
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.statistics import bootstrap_ratio_of_medians, percentiles
from deliberate.installation import install_extra
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError

# Streams that warm both servers up.
_WARM = 3


@dataclass
class KillCounts:
    """What became of the requests while replicas were killed.

    Attributes:
        asked, answered, retried: requests.
        kills: replicas.
        missed: kills that were due while the one before was not replaced yet.
        away: seconds until the fleet was whole again, after each kill.
    """

    asked: int = 0
    answered: int = 0
    retried: int = 0
    kills: int = 0
    missed: int = 0
    away: list[float] = field(default_factory=list)

    @property
    def success(self) -> float:
        """Share of the requests that were answered."""
        return self.answered / self.asked if self.asked else 0.0


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench replicas`` with overrides of `configs/bench_replicas.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or the servers do not start.
    """
    cfg = bench_config("bench_replicas", arguments, verbatim=("model", "out"))
    check(cfg)
    try:
        import httpx  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        raise DeliberateError(
            f"bench replicas needs {error.name}: {install_extra('serve,ray')}"
        ) from None
    session = Session("replicas", arguments, cfg.threads)
    rates: dict[str, list[float]] = {"one": [], "many": []}
    costs = {name: RequestCosts() for name in rates}
    first: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        many, many_pid = _start(stack, cfg, cfg.replicas)
        if cfg.rounds:
            one, one_pid = _start(stack, cfg, 1)
            servers = {"one": (one, 1, one_pid), "many": (many, cfg.replicas, many_pid)}
            asyncio.run(_rounds(cfg, servers, rates, costs))
        if cfg.first_tokens:
            plain, _ = stack.enter_context(
                served(str(cfg.model), list(map(str, cfg.serve_options)), threads=cfg.threads)
            )
            first = asyncio.run(_first_tokens(cfg, {"server": plain, "replicas": many}))
        kills = asyncio.run(_killed(cfg, many)) if cfg.kill_minutes else None
    session.end()
    console = table_console()
    made = efficiency(rates, cfg.replicas) if cfg.rounds else None
    cores = len(psutil.Process().cpu_affinity() or []) or psutil.cpu_count() or 1
    best = None
    if cfg.rounds:
        each = {name: spent.each for name, spent in costs.items()}
        best = highest_efficiency(each["one"], each["many"], cfg.replicas, cores)
        for name, spent in costs.items():
            console.print(f"{name}: {spent.line()}", soft_wrap=True)
        console.print(
            f"by these times {cores} cores allow {100 * best:.0f} % efficiency at best",
            soft_wrap=True,
        )
    if first:
        console.print(first_line(first), soft_wrap=True)
    if made is not None:
        console.print(
            f"{cfg.replicas} replicas against one: {100 * made[0]:.1f} % "
            f"[{100 * made[1]:.1f}, {100 * made[2]:.1f}] efficiency; tokens/s "
            f"{max(rates['one']):.0f} and {max(rates['many']):.0f} at best"
        )
    if kills is not None:
        away = ", ".join(f"{one:.0f}" for one in kills.away)
        console.print(
            f"{kills.kills} replicas killed: {kills.answered} of {kills.asked} requests answered, "
            f"{100 * kills.success:.2f} %, each asked at most {cfg.retries} times again "
            f"({kills.retried} were); whole again after {away or '-'} s; "
            f"{kills.missed} kills left out",
            soft_wrap=True,
        )
    console.print(session.line())
    session.write(
        cfg.out,
        {
            "settings": OmegaConf.to_container(cfg),
            "tokens_per_second": rates,
            "efficiency": made,
            "processor_seconds": {name: one.each for name, one in costs.items()},
            "cores": cores,
            "highest_efficiency": best,
            "first_token_seconds": first,
            "kills": None if kills is None else vars(kills) | {"success": kills.success},
        },
    )


def efficiency(rates: dict[str, list[float]], replicas: int) -> tuple[float, float, float]:
    """Throughput of many over that of as many single ones, with its 95 % interval over rounds."""
    found = bootstrap_ratio_of_medians(rates["many"], rates["one"])
    low, high = (found.value,) * 2
    if found.interval is not None:
        low, high = found.interval.low, found.interval.high
    return found.value / replicas, low / replicas, high / replicas


def check(cfg: DictConfig) -> None:
    """Refuses settings that cannot work.

    Raises:
        DeliberateError: the message names the first of them.
    """
    all_at_least(
        cfg,
        {"replicas": 2, "clients": 1, "max_tokens": 1, "threads": 1, "rounds": 0, "retries": 0}
        | {"first_tokens": 0},
    )
    for name in ("seconds", "kill_seconds", "timeout"):
        if not cfg[name] > 0:
            raise DeliberateError(f"{name}={cfg[name]} must be a number above 0")
    if cfg.kill_minutes < 0:
        raise DeliberateError(f"kill_minutes={cfg.kill_minutes} must be 0 or more")
    if not cfg.rounds and not cfg.kill_minutes:
        raise DeliberateError("rounds=0 and kill_minutes=0 leave nothing to do: give one of them")


def first_line(first: dict[str, list[float]]) -> str:
    """Times to the first token of a lone client, in one line."""
    parts = []
    for name, seconds in first.items():
        spread = percentiles(seconds)
        parts.append(f"{name} {1000 * spread.median:.1f} / {1000 * spread.p90:.1f}")
    pairs = zip(first["server"], first["replicas"], strict=True)
    added = percentiles([b - a for a, b in pairs])
    return (
        f"first token of {len(first['server'])} streams, P50 / P90 ms: {', '.join(parts)}; added "
        f"by the front and Ray {1000 * added.median:.1f} / {1000 * added.p90:.1f}"
    )


def _start(stack: contextlib.ExitStack, cfg: DictConfig, replicas: int) -> tuple[str, int]:
    options = ["--replicas", str(replicas), "--threads", str(cfg.threads)]
    options += map(str, cfg.serve_options)
    return stack.enter_context(
        served(str(cfg.model), options, executor=str(cfg.executor), threads=cfg.threads)
    )


def _prompts(cfg: DictConfig) -> list[str]:
    return [
        PROMPT.format(question=one.question)
        for one in word_problems("test", size=256, seed=cfg.seed)
    ]


async def _rounds(
    cfg: DictConfig,
    servers: dict[str, tuple[str, int, int]],
    rates: dict[str, list[float]],
    costs: dict[str, RequestCosts],
) -> None:
    """Every server in turn, in an order that rotates; the first round warms up."""
    prompts = _prompts(cfg)
    for number in range(cfg.rounds + 1):
        order = list(servers)[:: 1 if number % 2 else -1]
        for name in order:
            url, replicas, pid = servers[name]
            before = processor_seconds(pid)
            rate, answers = await _load(cfg, url, cfg.clients * replicas, prompts, cfg.seconds)
            if number:
                rates[name].append(rate)
                costs[name].note(before, processor_seconds(pid), answers)


async def _load(
    cfg: DictConfig, url: str, clients: int, prompts: list[str], seconds: float
) -> tuple[float, int]:
    """Tokens a second of a closed loop, and answers in all."""
    dice, tokens, answers, began = random.Random(cfg.seed), 0, 0, time.perf_counter()
    async with _http(cfg, url) as http:

        async def one() -> None:
            nonlocal tokens, answers
            while time.perf_counter() - began < seconds:
                answer = await http.post(
                    "/v1/completions", json=_body(cfg, dice.choice(prompts), "dense")
                )
                if answer.status_code != 200:
                    raise DeliberateError(
                        f"{url}: status {answer.status_code}: {answer.text[:200]}"
                    )
                tokens += answer.json()["usage"]["completion_tokens"]
                answers += 1

        await asyncio.gather(*(one() for _ in range(clients)))
    return tokens / (time.perf_counter() - began), answers


async def _first_tokens(cfg: DictConfig, servers: dict[str, str]) -> dict[str, list[float]]:
    """Seconds to the first text of a stream, one request at a time, of every server in turn."""
    found: dict[str, list[float]] = {name: [] for name in servers}
    prompts = _prompts(cfg)
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(_http(cfg, url)) for name, url in servers.items()
        }
        for number in range(cfg.first_tokens + _WARM):
            order = list(servers)[:: 1 if number % 2 else -1]
            for name in order:
                body = _body(cfg, prompts[number % len(prompts)], "dense") | {"stream": True}
                began, first = time.perf_counter(), None
                async with clients[name].stream("POST", "/v1/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if first is None and '"text":"' in line and '"text":""' not in line:
                            first = time.perf_counter() - began
                if first is None:
                    raise DeliberateError(f"{servers[name]}: a stream without text")
                if number >= _WARM:
                    found[name].append(first)
    return found


async def _killed(cfg: DictConfig, url: str) -> KillCounts:
    """Replicas are killed by and by while clients ask."""
    counts, dice, prompts = KillCounts(), random.Random(cfg.seed), _prompts(cfg)
    end = time.monotonic() + 60 * cfg.kill_minutes
    async with _http(cfg, url) as http:

        async def one() -> None:
            while time.monotonic() < end:
                body = _body(cfg, dice.choice(prompts), None)
                counts.asked += 1
                for attempt in range(cfg.retries + 1):
                    counts.retried += attempt > 0
                    if await _answered(http, body):
                        counts.answered += 1
                        break

        async def kill() -> None:
            due = time.monotonic() + cfg.kill_seconds
            while due < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due += cfg.kill_seconds
                well = await _processes(http)
                if len(well) < cfg.replicas:
                    counts.missed += 1  # the last one that was killed is not back yet
                    continue
                os.kill(dice.choice(well), signal.SIGKILL)
                counts.kills += 1
                returning.append(asyncio.create_task(whole(time.monotonic())))
            await asyncio.gather(*returning)

        async def whole(began: float) -> None:
            await asyncio.sleep(1.0)
            while len(await _processes(http)) < cfg.replicas:
                if time.monotonic() >= end:
                    return
                await asyncio.sleep(0.5)
            counts.away.append(time.monotonic() - began)

        returning: list[asyncio.Task[None]] = []
        clients = (one() for _ in range(cfg.clients * cfg.replicas))
        await asyncio.gather(kill(), *clients)
    return counts


async def _processes(http: Any) -> list[int]:
    """Ids of the replicas' processes that decode."""
    answer = await http.get("/health")
    found = answer.json()["replicas"].values()
    return [int(one["pid"]) for one in found if one["status"] == "ok"]


async def _answered(http: Any, body: dict[str, Any]) -> bool:
    import httpx

    try:
        answer = await http.post("/v1/completions", json=body)
    except httpx.HTTPError:
        return False
    return bool(answer.status_code == 200)


def _body(cfg: DictConfig, prompt: str, fidelity: str | None) -> dict[str, Any]:
    made = {"model": str(cfg.model), "prompt": prompt, "max_tokens": cfg.max_tokens}
    made["temperature"] = 0
    return made if fidelity is None else made | {"fidelity": fidelity}


def _http(cfg: DictConfig, url: str) -> Any:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=cfg.timeout, limits=limits, trust_env=False)
