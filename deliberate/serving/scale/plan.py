"""`python -m deliberate.serving.scale.plan`: large fleets on a simulated clock, from a cost model.

Three tables: prompts and answers on machines of their own against together, routers that look at
some of many replicas, and how many fronts a fleet needs. The cost model is the one that
`deliberate bench cost` keeps of a model on this machine, or its `out` file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deliberate.cost.model import CostModel
from deliberate.serving.scale.fleet import Fleet, Job, Machine, Router, by_score, fewest_requests
from deliberate.serving.scale.replica_score import ScoreWeights
from deliberate.serving.scale.replica_sizes import step_seconds
from deliberate.serving.scale.separation import (
    Layout,
    Separation,
    StepTimes,
    arrivals,
    capacity,
    served,
)
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import read_json


@dataclass(frozen=True)
class Plan:
    """What is simulated; every field is a ``name=value`` on the command line.

    Attributes:
        model: whose kept cost model is taken.
        cost: file that `deliberate bench cost out=FILE` wrote; empty: the kept one.
        machines: of the first table.
        requests: of each run.
        load: arrivals as a share of what the machines can do together.
        prompt, answer: mean tokens; lengths are uniform from half to one and a half of it.
        slots: requests of a machine at a time.
        network: bytes a second between machines.
        kv_bytes: of a token's keys and values.
        first_ms, gap_ms: limits of the first token and of every gap.
        replicas: largest fleet of the second table.
        front_ms: processor time of a front for a request (`deliberate bench replicas`).
        seed: of the draws.
    """

    model: str = "smollm2"
    cost: str = ""
    machines: int = 16
    requests: int = 1500
    load: float = 0.8
    prompt: int = 256
    answer: int = 64
    slots: int = 16
    network: float = 1.25e9
    kv_bytes: int = 46080
    first_ms: float = 2000.0
    gap_ms: float = 250.0
    replicas: int = 1000
    front_ms: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("model", "cost", "seed") and not value > 0:
                raise DeliberateError(f"{one.name}={value} must be a number above 0")


def read_plan(arguments: Sequence[str]) -> Plan:
    """From ``name=value`` arguments.

    Raises:
        DeliberateError: an unknown name, or a value of another kind.
    """
    kinds: Mapping[str, Callable[[str], Any]] = {
        one.name: {"int": int, "float": float, "str": str}[str(one.type)] for one in fields(Plan)
    }
    given: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in kinds:
            raise DeliberateError(f"{argument}: give name=value of {', '.join(kinds)}")
        try:
            given[name] = kinds[name](value)
        except ValueError:
            kind = kinds[name].__name__
            raise DeliberateError(f"{name}={value!r} must be of type {kind}") from None
    return Plan(**given)


def cost_of(plan: Plan) -> CostModel:
    """The measured cost model.

    Raises:
        DeliberateError: none was measured, or the file has none.
    """
    if plan.cost:
        raw = read_json(Path(plan.cost).expanduser())
        if not isinstance(raw, Mapping) or not {"cost", "segments"} & set(raw):
            raise DeliberateError(f"cost={plan.cost}: no file of `deliberate bench cost out=FILE`")
        return CostModel.from_dict(raw.get("cost", raw))  # or one from the cache folder
    from deliberate.api.model import AdaptiveModel
    from deliberate.serving.served_version import kept_cost

    found = kept_cost(AdaptiveModel.from_pretrained(plan.model))
    if found is None:
        raise DeliberateError(
            f"model={plan.model}: no cost model was measured here: run `deliberate bench cost "
            f"model={plan.model}`, or give cost=FILE"
        )
    return found


def times_of(cost: CostModel, plan: Plan) -> StepTimes:
    """Of a machine with this cost model."""

    def decode(running: int) -> float:
        return step_seconds(cost, running)

    def transfer(tokens: int) -> float:
        return tokens * plan.kv_bytes / plan.network

    return StepTimes(decode, cost.prompt_seconds, transfer)


def separation_table(plan: Plan, times: StepTimes) -> Table:
    """Every split of the machines, and chunks of prompts where they do both."""
    lengths = _range(plan.prompt), _range(plan.answer)
    together = Layout(plan.machines, slots=plan.slots)
    rate = plan.load * capacity(times, together, *lengths)
    layouts = {"together, chunks of 256": together}
    layouts["together, chunks of 64"] = Layout(plan.machines, slots=plan.slots, chunk=64)
    for prefill in sorted({max(1, round(plan.machines * share / 16)) for share in range(2, 15, 2)}):
        if prefill < plan.machines:
            name = f"{prefill} for prompts, {plan.machines - prefill} for answers"
            layouts[name] = Layout(plan.machines, prefill, plan.slots)
    table = Table(title=f"{plan.machines} machines, {rate:.1f} requests/s offered")
    for name in ("machines", "first P50", "P99 ms", "gap P50", "P99 ms", "in time", "served/s"):
        table.add_column(name, justify="left" if name == "machines" else "right")
    for name, layout in layouts.items():
        turns = arrivals(rate, plan.requests, *lengths, plan.seed)
        Separation(times, layout).run(turns)
        found = served(turns, plan.first_ms / 1000, plan.gap_ms / 1000)
        table.add_row(
            name,
            *(f"{1000 * one:.0f}" for one in (*found.first, *found.gap)),
            f"{found.in_time:.0%}",
            f"{found.rate:.1f}",
        )
    return table


def fleet_table(plan: Plan, times: StepTimes) -> Table:
    """Routers that look at some of the replicas, for fleets of several sizes."""
    machine = Machine(plan.slots, times.decode, times.prompt)
    each = capacity(times, Layout(1, slots=plan.slots), _range(plan.prompt), _range(plan.answer))
    table = Table(title=f"one router at {plan.load:.0%} of capacity; whole answers, P50 / P99 s")
    sizes = [size for size in (10, 100, 1000, 10_000) if size <= plan.replicas]
    table.add_column("looks at")
    for size in sizes:
        table.add_column(f"{size} replicas", justify="right")
    routers: list[tuple[str, int | None, Callable[[], Router]]] = [
        ("1, in turn", 1, fewest_requests),
        ("2, fewest requests", 2, fewest_requests),
        ("2, by score", 2, lambda: by_score(ScoreWeights())),
        ("8, by score", 8, lambda: by_score(ScoreWeights())),
        ("all, by score", None, lambda: by_score(ScoreWeights())),
    ]
    for name, look_at, router in routers:
        cells = []
        for size in sizes:
            if look_at is None and size > 100:
                cells.append("-")  # for each request all states: the cost that is to be avoided
                continue
            jobs = _jobs(plan, plan.load * size * each, max(plan.requests, 20 * size))
            Fleet(dict.fromkeys(map(str, range(size)), machine), router(), look_at=look_at).run(
                jobs
            )
            seconds = sorted((job.end or math.inf) - job.arrival for job in jobs)
            middle, late = (seconds[int(share * len(seconds))] for share in (0.5, 0.99))
            cells.append(f"{middle:.2f} / {late:.2f}")
        table.add_row(name, *cells)
    return table


def front_line(plan: Plan, times: StepTimes) -> str:
    """How many fronts the largest fleet needs, in one line."""
    each = capacity(times, Layout(1, slots=plan.slots), _range(plan.prompt), _range(plan.answer))
    rate = plan.load * plan.replicas * each
    fronts = math.ceil(rate * plan.front_ms / 1000 / 0.7)
    return (
        f"{plan.replicas} replicas at {plan.load:.0%} answer {rate:.0f} requests/s; at "
        f"{plan.front_ms:g} ms of processor time each that is {fronts} fronts of one core at 70 %"
    )


def _jobs(plan: Plan, rate: float, count: int) -> list[Job]:
    turns = arrivals(rate, count, _range(plan.prompt), _range(plan.answer), plan.seed)
    return [Job(one.arrival, one.prompt, one.answer) for one in turns]


def _range(mean: int) -> tuple[int, int]:
    return max(1, mean // 2), max(1, mean + mean // 2)


def main(arguments: Sequence[str]) -> None:
    """Prints the tables.

    Raises:
        DeliberateError: see `read_plan` and `cost_of`.
    """
    plan = read_plan(arguments)
    cost = cost_of(plan)
    times = times_of(cost, plan)
    console = Console(highlight=False)
    facts = cost.facts
    steps = ", ".join(f"{n}: {1000 * times.decode(n):.1f}" for n in (1, 4, plan.slots))
    console.print(
        f"a step of so many sequences, ms: {steps}; a prompt of {plan.prompt}: "
        f"{1000 * times.prompt(plan.prompt):.0f} ms; its keys and values: "
        f"{1000 * times.transfer(plan.prompt):.1f} ms on the network ({facts.get('device', '')}, "
        f"{facts.get('threads', '?')} thread(s), measured {facts.get('measured', '?')})",
        soft_wrap=True,
    )
    console.print(separation_table(plan, times))
    console.print(fleet_table(plan, times))
    console.print(front_line(plan, times), soft_wrap=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DeliberateError as error:
        sys.exit(f"error: {error}")
