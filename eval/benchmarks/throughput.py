"""`deliberate bench throughput`: many requests at a time, ours and transformers'.

Every variant serves every load, a round after a round, in rotating order, so that a change of the
machine's speed meets all of them. Loads: all requests at once; the same with few at a time; Poisson
arrivals at a share of the capacity that the first variant showed in this run; all behind a prefix.
Answers have given lengths, so that every variant makes the same tokens, and those of dense variants
are compared. A variant that fails is named with what its library said.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.harness import (
    Session,
    load_model,
    stop_if_inexact,
    table_console,
    thresholds_of,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.benchmarks.throughput_engine import EngineServer
from deliberate.eval.benchmarks.throughput_figures import Rounds, report, show
from deliberate.eval.benchmarks.throughput_load import ARRIVING, LOADS, Load, arriving, loads_of
from deliberate.eval.benchmarks.throughput_servers import (
    Server,
    StaticServer,
    TransformersContinuous,
    bytes_per_token,
    static_dense,
    transformers_static,
)
from deliberate.utils.checks import all_at_least, at_least, one_of
from deliberate.utils.errors import DeliberateError

WIDTH = 150
_WARM_ANSWER = 8
_DENSE = DecodingSpec(fidelity=Fidelity.DENSE)

Make = Callable[[AdaptiveModel, DictConfig], Server]

SERVERS: Mapping[str, Make] = {
    "engine dense": lambda model, cfg: EngineServer(model, _DENSE, cfg.block_tokens),
    "engine exact": lambda model, cfg: EngineServer(
        model,
        DecodingSpec(fidelity=Fidelity.EXACT, thresholds=thresholds_of(cfg)),
        cfg.block_tokens,
    ),
    "engine dense, unshared": lambda model, cfg: EngineServer(model, _DENSE),
    "static dense": lambda model, cfg: StaticServer(static_dense(model), cfg.batch_size),
    "transformers static": lambda model, cfg: StaticServer(
        transformers_static(model), cfg.batch_size
    ),
    "transformers continuous": lambda model, cfg: TransformersContinuous(
        model,
        attention=str(cfg.continuous.attention),
        page_size=cfg.continuous.page_size,
        max_batch_tokens=cfg.continuous.max_batch_tokens,
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench throughput`` with overrides of `configs/bench_throughput.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or exact mode's tokens differ from dense.
    """
    cfg = bench_config("bench_throughput", arguments, verbatim=("model", "out"))
    _check(cfg)
    session = Session("throughput", arguments, cfg.threads)
    model = load_model(cfg)
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    loads = loads_of(cfg, tokenizer, model.backbone.max_positions)
    servers = {name: SERVERS[name](model, cfg) for name in cfg.variants}
    rounds = measure(servers, loads, cfg)
    session.end()
    console = table_console(WIDTH)
    token_bytes = bytes_per_token(model)
    figures = {
        name: report(loads[name], own, token_bytes, cfg.seed) for name, own in rounds.items()
    }
    for name, own in figures.items():
        show(name, own, console)
    console.print(f"executor: {model.executor}; {session.line()}", highlight=False)
    session.write(
        cfg.out,
        {
            "settings": OmegaConf.to_container(cfg),
            "executor": model.executor,
            "bytes_per_token": token_bytes,
            "loads": figures,
        },
    )
    for name, own in figures.items():
        exact = own["variants"].get("engine exact", {})
        if own["identical_to"] == "engine dense" and "identical" in exact:
            stop_if_inexact(exact["identical"], own["requests"], f"requests of the load {name}")


def measure(
    servers: Mapping[str, Server], loads: dict[str, Load], cfg: DictConfig
) -> dict[str, dict[str, Rounds]]:
    """Rounds of every load by every variant; those that arrive at random come last
    and get their arrivals here."""
    made = {name: {variant: Rounds() for variant in servers} for name in loads}
    warm: dict[str, str] = {}
    # The capacity of `poisson` is that of `once`, which is therefore served first.
    names = sorted(loads, key=lambda name: (name in ARRIVING, name != "once"))
    extra = sum(name in loads and (name != "poisson" or "once" not in loads) for name in ARRIVING)
    total = len(servers) * (1 + len(names) * cfg.rounds) + extra
    with tqdm(total=total, desc="bench throughput", leave=False) as bar:
        for variant, server in servers.items():
            bar.set_postfix_str(f"{variant}, warm-up")
            failure = _try(server, _warm(next(iter(loads.values())), cfg.warmup), None)
            if failure is not None:
                warm[variant] = failure
            bar.update()
        for name in names:
            if name in ARRIVING:
                before = made.get("once", {}) if name == "poisson" else {}
                rate = cfg.rate * _capacity(servers, loads[name], before, warm)
                loads[name] = arriving(loads[name], rate, cfg.seed)
                bar.update(not before)
            for number in range(cfg.rounds):
                order = list(servers)
                first = number % len(order)
                for variant in order[first:] + order[:first]:
                    own = made[name][variant]
                    own.failure = own.failure or warm.get(variant)
                    bar.set_postfix_str(f"{name}, {variant}")
                    if own.failure is None:
                        gc.collect()
                        own.failure = _try(servers[variant], loads[name], own)
                    bar.update()
    return {name: made[name] for name in loads}


def _capacity(
    servers: Mapping[str, Server],
    load: Load,
    made: Mapping[str, Rounds],
    failed: Mapping[str, str],
) -> float:
    """Requests a second of the first variant that works, all at once; `made`: rounds of that."""
    variant = next((name for name in servers if name not in failed), None)
    if variant is None:
        raise DeliberateError("no variant works: " + "; ".join(failed.values()))
    own = made.get(variant, Rounds())
    if not own.seconds:
        failure = _try(servers[variant], load, own)
        if failure is not None:
            raise DeliberateError(f"{variant}, whose capacity sets the arrivals, failed: {failure}")
    return len(load.calls) / min(own.seconds)


def _warm(load: Load, requests: int) -> Load:
    """The first requests of a load, with short answers."""
    calls = tuple(
        type(call)(call.prompt, min(call.answer, _WARM_ANSWER)) for call in load.calls[:requests]
    )
    return Load("warm-up", calls, load.at_a_time)


def _try(server: Server, load: Load, rounds: Rounds | None) -> str | None:
    """Serves a load; what failed in one line, None where nothing did."""
    try:
        served = server.serve(load)
    except Exception as error:  # any library's own: a rival that fails is named, not left out
        return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    for call, tokens, times in zip(load.calls, served.tokens, served.times, strict=True):
        if len(tokens) != call.answer or len(times) != call.answer:
            return f"{len(tokens)} tokens with {len(times)} times for a request of {call.answer}"
    if rounds is not None:
        rounds.add(load, served)
    return None


def _check(cfg: DictConfig) -> None:
    for name in cfg.variants:
        one_of("variants", name, SERVERS)
    for name in cfg.loads:
        one_of("loads", name, LOADS)
    for name in ("variants", "loads"):
        if not cfg[name]:
            raise DeliberateError(f"{name} is empty: name at least one")
    least = {"requests": 2, "few": 1, "max_running": 1, "batch_size": 1, "rounds": 1, "warmup": 1}
    all_at_least(cfg, least | {"threads": 1, "prefix_tokens": 1})
    ranges = "prompt_tokens", "answer_tokens", "own_tokens", "prefix_answer_tokens", "long_tokens"
    for name in ranges:
        _range(name, cfg[name])
    if not 0 <= cfg.long_share <= 1:
        raise DeliberateError(f"long_share={cfg.long_share} must be from 0 to 1")
    if cfg.block_tokens is not None:
        at_least("block_tokens", cfg.block_tokens, 1)
    if not cfg.rate > 0:
        raise DeliberateError(f"rate={cfg.rate} must be above 0, a share of the capacity")


def _range(name: str, value: Any) -> None:
    given = list(value)
    if (
        len(given) != 2
        or not all(type(one) is int for one in given)
        or not 1 <= given[0] <= given[1]
    ):
        raise DeliberateError(f"{name}={given} must be two whole numbers from 1, the lower first")
