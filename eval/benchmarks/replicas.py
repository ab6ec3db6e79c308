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

from omegaconf import DictConfig, OmegaConf

from deliberate.data.prompts import PROMPT
from deliberate.data.word_problems import word_problems
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.server_process import served
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.statistics import bootstrap_ratio_of_medians
from deliberate.installation import install_extra
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError


@dataclass
class KillCounts:
    """What became of the requests while replicas were killed.

    Attributes:
        asked, answered, retried: requests.
        kills: replicas.
        away: seconds until the fleet was whole again, after each kill.
    """

    asked: int = 0
    answered: int = 0
    retried: int = 0
    kills: int = 0
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
    with contextlib.ExitStack() as stack:
        many = _start(stack, cfg, cfg.replicas)
        if cfg.rounds:
            one = _start(stack, cfg, 1)
            asyncio.run(_rounds(cfg, {"one": (one, 1), "many": (many, cfg.replicas)}, rates))
        kills = asyncio.run(_killed(cfg, many)) if cfg.kill_minutes else None
    session.end()
    console = table_console()
    made = efficiency(rates, cfg.replicas) if cfg.rounds else None
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
            f"({kills.retried} were); whole again after {away or '-'} s",
            soft_wrap=True,
        )
    console.print(session.line())
    session.write(
        cfg.out,
        {
            "settings": OmegaConf.to_container(cfg),
            "tokens_per_second": rates,
            "efficiency": made,
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
        cfg, {"replicas": 2, "clients": 1, "max_tokens": 1, "threads": 1, "rounds": 0, "retries": 0}
    )
    for name in ("seconds", "kill_seconds", "timeout"):
        if not cfg[name] > 0:
            raise DeliberateError(f"{name}={cfg[name]} must be a number above 0")
    if cfg.kill_minutes < 0:
        raise DeliberateError(f"kill_minutes={cfg.kill_minutes} must be 0 or more")
    if not cfg.rounds and not cfg.kill_minutes:
        raise DeliberateError("rounds=0 and kill_minutes=0 leave nothing to do: give one of them")


def _start(stack: contextlib.ExitStack, cfg: DictConfig, replicas: int) -> str:
    options = ["--replicas", str(replicas), "--threads", str(cfg.threads)]
    options += map(str, cfg.serve_options)
    url, _ = stack.enter_context(
        served(str(cfg.model), options, executor=str(cfg.executor), threads=cfg.threads)
    )
    return url


def _prompts(cfg: DictConfig) -> list[str]:
    return [
        PROMPT.format(question=one.question)
        for one in word_problems("test", size=256, seed=cfg.seed)
    ]


async def _rounds(
    cfg: DictConfig, servers: dict[str, tuple[str, int]], rates: dict[str, list[float]]
) -> None:
    """Every server in turn, in an order that rotates; the first round warms up."""
    prompts = _prompts(cfg)
    for number in range(cfg.rounds + 1):
        order = list(servers)[:: 1 if number % 2 else -1]
        for name in order:
            url, replicas = servers[name]
            rate = await _load(cfg, url, cfg.clients * replicas, prompts, cfg.seconds)
            if number:
                rates[name].append(rate)


async def _load(
    cfg: DictConfig, url: str, clients: int, prompts: list[str], seconds: float
) -> float:
    """Tokens a second of a closed loop."""
    dice, tokens, began = random.Random(cfg.seed), 0, time.perf_counter()
    async with _http(cfg, url) as http:

        async def one() -> None:
            nonlocal tokens
            while time.perf_counter() - began < seconds:
                answer = await http.post(
                    "/v1/completions", json=_body(cfg, dice.choice(prompts), "dense")
                )
                if answer.status_code != 200:
                    raise DeliberateError(
                        f"{url}: status {answer.status_code}: {answer.text[:200]}"
                    )
                tokens += answer.json()["usage"]["completion_tokens"]

        await asyncio.gather(*(one() for _ in range(clients)))
    return tokens / (time.perf_counter() - began)


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
            while time.monotonic() + cfg.kill_seconds < end:
                await asyncio.sleep(cfg.kill_seconds)
                well = await _processes(http)
                if len(well) < cfg.replicas:
                    continue  # the last one that was killed is not back yet
                os.kill(dice.choice(well), signal.SIGKILL)
                counts.kills += 1
                began = time.monotonic()
                await asyncio.sleep(1.0)
                while len(await _processes(http)) < cfg.replicas and time.monotonic() < end:
                    await asyncio.sleep(0.5)
                counts.away.append(time.monotonic() - began)

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
