"""`deliberate bench serve`: load on a server over HTTP, closed loop and Poisson arrivals.

The server is one that runs on this machine already (`url`), or `deliberate serve` in a process of
its own for the time of the run. Load goes to loopback addresses only, and every load has a bound in
requests and in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from deliberate.api import checkpoint
from deliberate.data.prompts import PROMPT, has_chat_template
from deliberate.data.word_problems import word_problems
from deliberate.eval.benchmarks.harness import Session, load_model, table_console
from deliberate.eval.benchmarks.serve_load import DATASETS, poisson, shots
from deliberate.eval.benchmarks.server_process import served
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.installation import install_extra
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

if TYPE_CHECKING:
    from deliberate.eval.benchmarks.serve_reasoning import ReasoningCounts

LOADS = ("identity", "overhead", "closed", "poisson", "tiers", "burst", "zipf", "reasoning")
WIDTH = 200
_MOST_PROMPTS = 400  # of the short problems that the loads are drawn from


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench serve`` with overrides of `configs/bench_serve.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, no server answers, or an answer over HTTP or
            in the engine differs from the one that the request gets alone.
    """
    cfg = bench_config("bench_serve", arguments, verbatim=("model", "out", "url"), folder=True)
    try:
        from deliberate.eval.benchmarks import serve_client, serve_figures, serve_mixes
    except ImportError as error:
        raise DeliberateError(f"bench serve needs {error.name}: {install_extra('serve')}") from None
    check(cfg)
    if cfg.url is not None:
        cfg.url = serve_client.loopback_address(cfg.url)
    session = Session("serve", arguments, cfg.threads)
    with _server(cfg) as url:
        identity, overhead = _compared(cfg, url)
        loads = asyncio.run(_loads(cfg, url))
        mixes, lines = asyncio.run(serve_mixes.run_mixes(cfg, url))
        if (line := serve_figures.goodput_line(loads)) is not None:
            lines.insert(0, line)
        loads |= mixes
        reasoning = _reasoning(cfg, url)
    session.end()
    console = table_console(WIDTH)
    if loads:
        serve_figures.show(loads, console)
    for text in lines:
        console.print(text, soft_wrap=True, highlight=False)
    for fidelity, own in (identity or {}).items():
        console.print(f"{fidelity}: {serve_figures.identity_line(own)}")
    if overhead is not None:
        console.print(serve_figures.overhead_line(overhead), soft_wrap=True, highlight=False)
    if reasoning is not None:
        console.print(reasoning.line(), soft_wrap=True, highlight=False)
    line = session.line()
    console.print(line, highlight=False)
    if cfg.out is not None:
        settings = OmegaConf.to_container(cfg)
        folder = Path(str(cfg.out))
        record = {"settings": settings, "identity": identity, "overhead": overhead, "loads": loads}
        record["lines"] = lines
        record["reasoning"] = None if reasoning is None else asdict(reasoning)
        session.write(folder / "serve.json", record)
        command = shlex.join(["deliberate", "bench", "serve", *arguments])
        page = serve_figures.markdown(loads, identity, overhead, line, command, lines)
        write_text(folder / "serve.md", page)
        if loads:
            write_text(folder / "serve.svg", serve_figures.curve(loads))
        console.print(f"report: {folder / 'serve.md'}", markup=False, soft_wrap=True)
    for fidelity, own in (identity or {}).items():
        if min(own["engine"], own["http"]) < own["requests"]:
            raise DeliberateError(f"answers differ, {fidelity}: {serve_figures.identity_line(own)}")

    if reasoning is not None and reasoning.faults:
        raise DeliberateError(f"{reasoning.line()}; the first: {reasoning.faults[0]}")


Counts = dict[str, dict[str, Any]]


def _compared(cfg: DictConfig, url: str) -> tuple[Counts | None, dict[str, Any] | None]:
    """What the loads ``identity`` and ``overhead`` find, for which the model is loaded here."""
    if not {"identity", "overhead"} & set(cfg.loads):
        return None, None
    from deliberate.eval.benchmarks import serve_identity

    model, tokenizer = load_model(cfg), checkpoint.load_tokenizer(cfg.model)
    identity = overhead = None
    if "identity" in cfg.loads:
        identity = serve_identity.compare(model, tokenizer, url, cfg)
    if "overhead" in cfg.loads:
        overhead = serve_identity.overhead(model, tokenizer, url, cfg)
    return identity, overhead


async def _loads(cfg: DictConfig, url: str) -> dict[str, dict[str, Any]]:
    """Figures of ``closed`` and of ``poisson`` at each rate, by name."""
    from deliberate.eval.benchmarks.serve_client import Client
    from deliberate.eval.benchmarks.serve_figures import figures

    if not {"closed", "poisson"} & set(cfg.loads):
        return {}
    tokenizer, made = checkpoint.load_tokenizer(cfg.model), {}
    source = shots(cfg, tokenizer, None)
    asked = {"timeout": cfg.timeout, "api_key": cfg.api_key, "fidelity": cfg.fidelity}
    capacity = cfg.capacity
    # A capacity is of answers: a server that refuses would show another.
    async with Client(url, send_deadlines=False, **asked) as client:
        await client.closed(source, 2, 2, cfg.seconds)  # the first passes are slow: not counted
        if "closed" in cfg.loads:
            each = min(cfg.requests_per_client, max(1, cfg.max_requests // cfg.clients))
            run = await client.closed(source, cfg.clients, each, cfg.seconds)
            made[f"closed, {cfg.clients} clients"] = own = figures(run, None)
            capacity = capacity or own["answered_per_second"]
    async with Client(url, send_deadlines=cfg.send_deadlines, **asked) as client:
        for rate in cfg.rates if "poisson" in cfg.loads else ():
            arriving = poisson(source, rate * capacity, cfg.seconds, cfg.seed)
            if len(arriving) > cfg.max_requests:
                raise DeliberateError(
                    f"{len(arriving)} requests arrive in seconds={cfg.seconds} at "
                    f"{rate * capacity:.0f} a second: max_requests={cfg.max_requests}; lower "
                    "seconds or raise it"
                )
            run = await client.open(arriving)
            made[f"poisson, {100 * rate:.0f} %"] = figures(run, rate * capacity)
    return made


def _reasoning(cfg: DictConfig, url: str) -> ReasoningCounts | None:
    """What the load ``reasoning`` shows: random requests whose reasoning is limited."""
    if "reasoning" not in cfg.loads:
        return None
    from deliberate.eval.benchmarks import serve_reasoning

    rng = random.Random(int(cfg.seed))
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    asked = word_problems("test", size=cfg.reasoning.requests, seed=cfg.seed)
    sent = [
        serve_reasoning.draw(
            rng,
            str(cfg.model),
            PROMPT.format(question=problem.question),
            chat=has_chat_template(tokenizer),
            most=cfg.reasoning.max_tokens,
        )
        for problem in asked
    ]
    return serve_reasoning.run(
        url, sent, clients=cfg.clients, api_key=cfg.api_key, timeout=cfg.timeout
    )


@contextlib.contextmanager
def _server(cfg: DictConfig) -> Iterator[str]:
    """Address of the server: `url`, or of one that is started, and stopped afterwards."""
    if cfg.url is not None:
        yield cfg.url
        return
    from deliberate.eval.benchmarks.serve_mixes import server_options

    options = [*map(str, cfg.serve_options), *server_options(cfg)]
    with served(str(cfg.model), options, executor=str(cfg.executor), threads=cfg.threads) as (
        url,
        _,
    ):
        yield url


def check(cfg: DictConfig) -> None:
    """Refuses settings that cannot work.

    Raises:
        DeliberateError: the message names the first of them.
    """
    if not cfg.loads:
        raise DeliberateError(f"loads is empty: name at least one of {', '.join(LOADS)}")
    for name in cfg.loads:
        one_of("loads", name, LOADS)
    one_of("dataset", cfg.dataset, DATASETS)
    for name in cfg.identity.fidelities:
        one_of("identity.fidelities", name, ("dense", "exact"))
    least = {"clients": 1, "requests_per_client": 1, "max_requests": 1, "threads": 1}
    least |= {"zipf.prompts": 1, "zipf.requests": 1}
    least |= {"reasoning.requests": 1, "reasoning.max_tokens": 24}
    least |= {"identity.requests": 1, "identity.max_tokens": 1, "long_prompt_tokens": 1}
    all_at_least(cfg, least | {"short_max_tokens": 1, "long_max_tokens": 1})
    if cfg.zipf.prompts > _MOST_PROMPTS:
        raise DeliberateError(f"zipf.prompts={cfg.zipf.prompts}: {_MOST_PROMPTS} at most")
    if not 0 <= cfg.long_share <= 1:
        raise DeliberateError(f"long_share={cfg.long_share} must be from 0 to 1")
    positive = {name: cfg[name] for name in ("seconds", "timeout")}
    for name in ("capacity", "short_deadline_ms", "long_deadline_ms"):
        if cfg[name] is not None:
            positive[name] = cfg[name]
    positive |= {
        "tiers.rate": cfg.tiers.rate,
        "burst.rate": cfg.burst.rate,
        "burst.factor": cfg.burst.factor,
        "zipf.exponent": cfg.zipf.exponent,
    }
    positive |= {f"rates[{index}]": rate for index, rate in enumerate(cfg.rates)}
    for name, value in positive.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise DeliberateError(f"{name}={value} must be a number above 0")
    if "poisson" in cfg.loads and "closed" not in cfg.loads and cfg.capacity is None:
        raise DeliberateError(
            "loads has poisson without closed, which measures the capacity: add it, or give "
            "capacity=REQUESTS_A_SECOND"
        )
    if cfg.url is not None and list(cfg.serve_options):
        raise DeliberateError("serve_options start a server, url names one: give one of the two")
