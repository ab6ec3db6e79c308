"""What tokens and probes of recorded chains cost today, by the model that made them.

Seconds of a recording are older than the code that decodes now. Its chains are not, as long as the
weights and the conditions are the same: greedy and sampled tokens do not depend on how fast they
come. In exact mode they are those of dense decoding, so one recording has the costs of both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from omegaconf import DictConfig

from deliberate.data.problem import Problem
from deliberate.eval.benchmarks.chain_setup import ChainSetup, chain_setup, places_of
from deliberate.eval.benchmarks.harness import CLOCKS
from deliberate.reasoning.chain_recorder import measure_costs
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.utils.errors import DeliberateError

_SAME_TOKENS = {"dense", "exact"}


def retimed(cfg: DictConfig, chains: ChainSet) -> ChainSet:
    """The chains with the costs of `cfg.timed` of their problems, decoded as `cfg.fidelity` says.

    Raises:
        DeliberateError: other weights or conditions, or a task without the file's problems.
    """
    if cfg.timed < 1:
        raise DeliberateError("retime=true with timed=0 measures nothing: give timed=8")
    setup = chain_setup(cfg)
    _check(setup, chains)
    names = {chain.id for chain in chains.chains}
    problems = [one for one in setup.task.problems if one.id in names][: cfg.timed + 1]
    if len(problems) < 2:
        raise DeliberateError(
            f"retime=true: task={setup.task.name} with task.size={len(setup.task.problems)} and "
            f"seed={cfg.seed} has {len(problems)} of the file's problems and 2 are needed: give "
            "the seed= that the chains were recorded with"
        )
    costs = _costs(setup, problems)
    _, exits = setup.model.fingerprints()
    header = dataclasses.replace(chains.header, costs=costs, fidelity=setup.fidelity, exits=exits)
    return dataclasses.replace(chains, header=header)


def _costs(setup: ChainSetup, problems: list[Problem]) -> ChainCosts:
    cfg = setup.cfg

    def request(number: int) -> ChainRequest:
        seed = None if cfg.samples == 1 else cfg.seed + 7919 * (number + 1)
        return setup.request(problems[number], seed=seed)

    alone = [functools.partial(request, number) for number in range(len(problems))]
    clock = CLOCKS[cfg.clock]
    return measure_costs(setup.runner, alone, places_of(cfg), setup.encode, clock)


def _check(setup: ChainSetup, chains: ChainSet) -> None:
    """Raises DeliberateError where the model of today would write other chains."""
    header = chains.header
    weights, _ = setup.model.fingerprints()
    if header.weights != weights:
        made = header.weights[:12] or "unknown weights"
        raise DeliberateError(
            f"retime=true: the chains are of {made}, model={setup.cfg.model} has {weights[:12]}: "
            "name the model that made them"
        )
    if header.fidelity != setup.fidelity and {header.fidelity, setup.fidelity} != _SAME_TOKENS:
        raise DeliberateError(
            f"retime=true: fidelity={setup.fidelity} would write other chains than "
            f"{header.fidelity}: only dense and exact write the same"
        )
    made_by, today = dict(header.conditions), setup.conditions()
    for name in sorted({*made_by, *today} - {"fidelity"}):
        _equal(name, made_by.get(name), today.get(name))


def _equal(name: str, made: Any, today: Any) -> None:
    if made != today:
        raise DeliberateError(
            f"retime=true: the chains were made with {name}={made!r}, not {today!r}: give the "
            "settings of the recording"
        )
