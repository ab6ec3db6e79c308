"""Times of calls on a CPU and on a GPU, and the rates that floors are made of.

On a GPU every way is captured in a graph and replayed after the L2 cache is overwritten, over
rotating sets of tensors, between events. Ways are interleaved, so that a change of the machine's
speed meets all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deliberate.kernels.tools.bench_cases import Call

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
COLD_BYTES = 96 << 20  # rotating sets on a CPU reach past its last cache
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one way: 20th, 50th and 80th percentile over ``samples`` runs."""

    p20: float
    p50: float
    p80: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """From single runs in seconds; at least two."""
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return Timing(
            1e6 * fifths[0], 1e6 * statistics.median(seconds), 1e6 * fifths[3], len(seconds)
        )


def time_on_cpu(
    sets: Sequence[Mapping[str, Call]], samples: int, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Runs every way ``samples`` times in turn, each time on the next set of tensors."""
    names = list(sets[0])
    taken: dict[str, list[float]] = {name: [] for name in names}
    for index in range(samples + 1):
        variants = sets[index % len(sets)]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            began = clock()
            variants[name]()
            seconds = clock() - began
            if index > 0:  # the first call allocates and chooses kernels
                taken[name].append(seconds)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def time_on_gpu(sets: Sequence[Mapping[str, Call]], samples: int) -> dict[str, Timing]:
    """As on a CPU, but graphs between events, the cache overwritten before each."""
    names = _warmed_up(sets)
    graphs: list[dict[str, torch.cuda.CUDAGraph]] = []
    for variants in sets:
        made = {}
        for name in names:
            made[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(made[name]):
                variants[name]()
        graphs.append(made)
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for index in range(samples + 3):
        variants_now = graphs[index % len(graphs)]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            pair[0].record()
            variants_now[name].replay()
            pair[1].record()
            if index >= 3:
                events[name].append(pair)
    torch.cuda.synchronize()
    return {
        name: Timing.of([begin.elapsed_time(end) / 1e3 for begin, end in pairs])
        for name, pairs in events.items()
    }


def _warmed_up(sets: Sequence[Mapping[str, Call]]) -> list[str]:
    """Names of the ways that run, after each was run on a stream of its own.

    Kernels are compiled, and libraries make their handles, outside captures. A candidate (a tile,
    a rival) that cannot be compiled is left out by name; the op's own way must run.
    """
    names = []
    for name in sets[0]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for variants in sets:
                    for _ in range(3):
                        variants[name]()
        except Exception as error:
            if name.startswith("ours"):
                raise
            print(f"left out: {name}: {type(error).__name__}", flush=True)
            continue
        finally:
            torch.cuda.current_stream().wait_stream(side)
        names.append(name)
    return names


def copy_bandwidth(device: torch.device, samples: int = 20) -> float:
    """Bytes read plus bytes written per second of a large copy, B/s.

    On a GPU by a kernel: a plain copy in a graph goes to the copy engine, which on an H200 moves
    2.8 TB/s where kernels move 4.
    """
    size = (2 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    variants = {"copy": lambda: torch.bitwise_not(source, out=target)}
    timed = (
        time_on_gpu([variants], samples)
        if device.type == "cuda"
        else time_on_cpu([variants], samples)
    )
    return 2 * size / (timed["copy"].p50 / 1e6)


def event_overhead(device: torch.device) -> float | None:
    """Microseconds that the events around the smallest possible graph show; None on a CPU."""
    if device.type != "cuda":
        return None
    one = torch.zeros(1, device=device)
    return time_on_gpu([{"one": lambda: one.add_(1)}], 40)["one"].p50


def read_bandwidth(samples: int = 20) -> float:
    """Bytes per second of a sum over a large float32 vector on this CPU: what a GEMV can reach."""
    source = torch.ones(32 << 20)
    return source.numel() * 4 / (time_on_cpu([{"sum": source.sum}], samples)["sum"].p50 / 1e6)


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large bfloat16 product, 1/s; infinite on a CPU (not its limit)."""
    if device.type != "cuda":
        return float("inf")
    n = 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / (time_on_gpu([{"product": lambda: a @ b}], 10)["product"].p50 / 1e6)
