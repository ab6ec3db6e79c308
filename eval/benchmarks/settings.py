"""The benchmarks: what each answers, and its settings, checked before anything is measured."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from deliberate.utils.errors import DeliberateError
from deliberate.utils.folders import output_file, output_folder


class Bench(NamedTuple):
    """One bench: the module that runs it, its configuration, and the question that it answers."""

    module: str
    config: str
    question: str


# In the order in which they are listed: the first question first.
BENCHES = {
    "agreement": Bench(
        "deliberate.eval.benchmarks.agreement",
        "bench_agreement",
        "ask this first: how often do a model's exits choose what its last layer would, and how "
        "much time is that worth here?",
    ),
    "decode": Bench(
        "deliberate.eval.benchmarks.decode",
        "bench",
        "how fast is decoding, dense, exact and threshold, against transformers?",
    ),
    "rivals": Bench(
        "deliberate.eval.benchmarks.rivals",
        "bench_rivals",
        "how fast is a real model here against transformers and llama.cpp, on the same weights?",
    ),
    "first": Bench(
        "deliberate.eval.benchmarks.first",
        "bench_first",
        "does the first answer of a fresh process take longer in exact mode than dense?",
    ),
    "throughput": Bench(
        "deliberate.eval.benchmarks.throughput",
        "bench_throughput",
        "how many tokens a second for many requests at a time, and how long does each wait?",
    ),
    "serve": Bench(
        "deliberate.eval.benchmarks.serve",
        "bench_serve",
        "how long do clients of a server wait over HTTP, and how many answers meet their deadline?",
    ),
    "replicas": Bench(
        "deliberate.eval.benchmarks.replicas",
        "bench_replicas",
        "how much more do several replicas answer than one, and what does a killed one cost?",
    ),
    "soak": Bench(
        "deliberate.eval.benchmarks.soak",
        "bench_soak",
        "does a server keep its availability and its memory under hours of faults and swaps?",
    ),
    "swaps": Bench(
        "deliberate.eval.benchmarks.swaps",
        "bench_swaps",
        "does every answer stay one version's own while policy, exits, adapter and weights change?",
    ),
    "cost": Bench(
        "deliberate.eval.benchmarks.cost",
        "bench_cost",
        "what does each part of a step cost on this machine, and does that predict whole answers?",
    ),
    "exits": Bench(
        "deliberate.eval.benchmarks.exits",
        "bench_exits",
        "how many problems does a model solve if every token is chosen at one depth?",
    ),
    "budget": Bench(
        "deliberate.eval.benchmarks.budget",
        "bench_budget",
        "are latency budgets met, and at what accuracy?",
    ),
    "gate": Bench(
        "deliberate.eval.benchmarks.gate",
        "bench_gate",
        "what do the deliberation gate and early exit give together?",
    ),
    "cascade": Bench(
        "deliberate.eval.benchmarks.cascade",
        "bench_cascade",
        "what does a small model in front of a large one save, and what does it cost in accuracy?",
    ),
    "longtext": Bench(
        "deliberate.eval.benchmarks.long_text",
        "bench_longtext",
        "how often do long continuations repeat themselves, with and without the trigger?",
    ),
    "chains": Bench(
        "deliberate.eval.benchmarks.chains",
        "bench_chains",
        "where may a chain of reasoning end, what does that save, and at what certified risk?",
    ),
    "votes": Bench(
        "deliberate.eval.benchmarks.votes",
        "bench_votes",
        "what does a vote of several chains gain, and how few chains give the same answers?",
    ),
    "rate": Bench(
        "deliberate.eval.benchmarks.rate",
        "bench_rate",
        "what does one rate for length and number of chains give at the same seconds?",
    ),
    "floor": Bench(
        "deliberate.eval.benchmarks.floor",
        "bench_floor",
        "how near is one decoding step to reading the weights once?",
    ),
    "subset": Bench(
        "deliberate.eval.benchmarks.subset",
        "bench_subset",
        "would drafts by a subset of the layers, found by search, pay?",
    ),
    "depth": Bench(
        "deliberate.eval.benchmarks.depth",
        "bench_depth",
        "how many of its layers does a model need?",
    ),
    "skip": Bench(
        "deliberate.eval.benchmarks.skip",
        "bench_skip",
        "how many rows of the MLPs, and heads, could a token go without?",
    ),
    "resident": Bench(
        "deliberate.eval.benchmarks.resident",
        "bench_resident",
        "how much memory do an answer's tokens read, at full depth and with early exits?",
    ),
    "qat": Bench(
        "deliberate.eval.benchmarks.qat",
        "bench_qat",
        "what does rounding cost a model, and how much does training under it recover?",
    ),
    "precision": Bench(
        "deliberate.eval.benchmarks.precision",
        "bench_precision",
        "which layers bear fewer bits, and what do mixed plans gain and lose?",
    ),
}

RENAMED = {"bench_gate": {"ways": "variants", "prices": "lambdas"}}
"""Settings of earlier releases, by configuration: the old name and today's."""


def overview() -> str:
    """What `deliberate bench --help` prints: every bench with its question."""
    width = max(map(len, BENCHES))
    lines = [
        "usage: deliberate bench NAME [KEY=VALUE ...]   e.g. deliberate bench agreement model=NAME",
        "",
        *(f"  {name:<{width}}  {bench.question}" for name, bench in BENCHES.items()),
        "",
        "deliberate bench NAME --help prints the settings of one.",
    ]
    return "\n".join(lines)


def settings(name: str, overrides: Sequence[str]) -> str:
    """What `deliberate bench NAME --help` prints.

    Raises:
        DeliberateError: there is no such bench, or a mistyped key or value.
    """
    from deliberate.eval.tasks.registry import task_config

    bench = named(name)
    example = f"usage: deliberate bench {name} [KEY=VALUE ...]"
    cfg = OmegaConf.to_yaml(task_config(bench.config, overrides, verbatim=()))
    return f"{example}\n\n{bench.question}\n\nsettings (each can be overridden):\n\n{cfg}"


def named(name: str) -> Bench:
    """The bench of this name.

    Raises:
        DeliberateError: there is none.
    """
    if name not in BENCHES:
        raise DeliberateError(
            f"bench {name!r} is unknown: one of {', '.join(BENCHES)}, then key=value "
            "(deliberate bench --help says what each answers)"
        )
    return BENCHES[name]


def _refuse_renamed(name: str, arguments: Sequence[str]) -> None:
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in RENAMED.get(name, {}):
            now = RENAMED[name][key]
            raise DeliberateError(f"{key}={value}: the setting is called {now} now, give {now}=...")


def run_benchmark(arguments: Sequence[str]) -> None:
    """Runs the benchmark that the first argument names, with overrides of its configuration.

    Raises:
        DeliberateError: there is no such benchmark, or its configuration cannot work.
    """
    if not arguments:
        raise DeliberateError(f"bench needs a name: one of {', '.join(BENCHES)}")
    importlib.import_module(named(arguments[0]).module).main(arguments[1:])


def bench_config(
    name: str,
    arguments: Sequence[str],
    *,
    verbatim: Collection[str],
    folder: bool = False,
    required: bool = False,
) -> DictConfig:
    """The resolved configuration of a bench; `out`, where given, is a place that can be written.

    Args:
        name: of a root configuration, ``bench`` or ``bench_...``.
        arguments: overrides, ``key=value``.
        verbatim: keys whose values are taken as they are, see `compose`.
        folder: `out` is a folder, not a file.
        required: there is no run without an `out`.

    Raises:
        DeliberateError: a mistyped key or value, or an `out` that cannot be written.
    """
    from deliberate.eval.tasks.registry import task_config

    _refuse_renamed(name, arguments)
    cfg = task_config(name, arguments, verbatim=verbatim)
    if required or cfg.out is not None:
        cfg.out = str(output_folder(cfg.out) if folder else output_file(cfg.out))
    return cfg


def listed(cfg: DictConfig, key: str) -> list[Any]:
    """The list that a setting holds, as plain Python.

    Raises:
        DeliberateError: it holds a mapping or a single value.
    """
    return _plain(cfg, key, list, "a list")


def mapped(cfg: DictConfig, key: str) -> dict[str, Any]:
    """The settings by name that a setting holds, as plain Python.

    Raises:
        DeliberateError: it holds a list or a single value.
    """
    return _plain(cfg, key, dict, "a mapping")


def _plain(cfg: DictConfig, key: str, kind: type, name: str) -> Any:
    value = cfg[key]
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if not isinstance(plain, kind):
        raise DeliberateError(
            f"{key}={plain!r:.60} must be {name}, as the command's --help shows it"
        )
    return plain
