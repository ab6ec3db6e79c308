"""The loads of `deliberate bench serve` whose requests are not the short and long ones alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from omegaconf import DictConfig

from deliberate.api import checkpoint
from deliberate.eval.benchmarks.harness import UNBOUNDED
from deliberate.eval.benchmarks.serve_client import Client
from deliberate.eval.benchmarks.serve_figures import Figures, figures
from deliberate.eval.benchmarks.serve_hot import compare, drawn
from deliberate.eval.benchmarks.serve_load import Shot, poisson, shots
from deliberate.eval.benchmarks.serve_tiers import burst, burst_line, mixed, thirds, tiers_line
from deliberate.utils.errors import DeliberateError

MIXES = ("tiers", "burst", "zipf")


async def run_mixes(cfg: DictConfig, url: str) -> tuple[dict[str, Figures], list[str]]:
    """Figures of those of ``tiers``, ``burst`` and ``zipf`` that are asked for, by name, and one
    line of each that says what it shows.

    Raises:
        DeliberateError: more requests than `max_requests`, or a server that answers none.
    """
    if not set(MIXES) & set(cfg.loads):
        return {}, []
    source = shots(cfg, checkpoint.load_tokenizer(cfg.model), None)
    asked = {"timeout": cfg.timeout, "api_key": cfg.api_key, "fidelity": cfg.fidelity}
    loads: dict[str, Figures] = {}
    lines: list[str] = []

    def client(*, deadlines: bool) -> Client:
        return Client(url, send_deadlines=deadlines, **asked)

    async def capacity(name: str, made: Iterator[Shot]) -> float:
        """Answers a second without deadlines, `clients` at a time."""
        async with client(deadlines=False) as own:
            await own.closed(made, 2, 2, cfg.seconds)
            run = await own.closed(made, cfg.clients, cfg.max_requests, cfg.seconds / 2)
        loads[f"{name}, {cfg.clients} clients"] = found = figures(run, None)
        if not found["answered"]:
            raise DeliberateError(f"{name}: no request was answered: {found['errors'][:1]}")
        return float(found["answered_per_second"])

    if "tiers" in cfg.loads:
        tiers = mixed(source, cfg.seed)
        rate = cfg.tiers.rate * await capacity("tiers", tiers)
        arriving = _checked(cfg, poisson(tiers, rate, cfg.seconds, cfg.seed))
        async with client(deadlines=True) as own:
            run = await own.open(arriving)
        loads[f"tiers, {100 * cfg.tiers.rate:.0f} %"] = figures(run, rate)
        lines.append(tiers_line(run))
    if "burst" in cfg.loads:
        full = await capacity("burst", source)
        rate = cfg.burst.rate * full
        arriving = burst(source, rate, cfg.burst.factor, cfg.seconds, cfg.seed)
        async with client(deadlines=cfg.send_deadlines) as own:
            run = await own.open(_checked(cfg, arriving))
        names: tuple[tuple[str, float], ...] = (
            ("before", rate),
            ("through", rate * cfg.burst.factor),
            ("after", rate),
        )
        for (name, offered), part in zip(names, thirds(run, cfg.seconds), strict=True):
            loads[f"burst, {name}"] = figures(part, offered)
        lines.append(burst_line(run, cfg.seconds, full))
    if "zipf" in cfg.loads:
        short = (one for one in source if one.kind == "short")
        prompts = list(itertools.islice(_different(short), cfg.zipf.prompts))
        sent = drawn(prompts, cfg.zipf.exponent, cfg.zipf.requests, cfg.seed)
        async with client(deadlines=False) as own:
            lines.append((await compare(own, sent, cfg.clients, float(UNBOUNDED))).line())
    return loads, lines


def _different(source: Iterator[Shot]) -> Iterator[Shot]:
    seen: set[tuple[int, ...]] = set()
    for one in source:
        if one.prompt not in seen:
            seen.add(one.prompt)
            yield one


def _checked(cfg: DictConfig, arriving: list[Shot]) -> list[Shot]:
    if len(arriving) > cfg.max_requests:
        raise DeliberateError(
            f"{len(arriving)} requests arrive in seconds={cfg.seconds}: "
            f"max_requests={cfg.max_requests}; lower seconds or raise it"
        )
    return arriving


def server_options(cfg: DictConfig) -> list[str]:
    """What a server needs for the loads, besides `serve_options`."""
    given, made = [str(one) for one in cfg.serve_options], []
    needs: tuple[tuple[str, str, str], ...] = (
        ("tiers", "--scheduler", "feedback"),
        ("zipf", "--cache-entries", "4096"),
    )
    for load, option, value in needs:
        if load in cfg.loads and option not in given:
            made += [option, value]
    return made
