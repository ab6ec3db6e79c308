"""`python -m deliberate.kernels.bench`: each kernel's time against its floor and its rivals.

On a GPU every way is captured in a CUDA graph and replayed after the L2 cache is overwritten, over
rotating sets of tensors, between events; a device-to-device copy measured beside it gives the
bandwidth of the floor. On a CPU the torch references run and linear layers with float32, bfloat16
and int8 weights are compared, and the floors of an H200 are computed from its data sheet. Ways are
interleaved, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from deliberate.errors import DeliberateError
from deliberate.kernels.bench_cases import MODELS, Call, Case, cases, shapes_of
from deliberate.kernels.int8_linear import int8_linear, quantise
from deliberate.kernels.registry import KERNELS, Request

# Data sheet of the H200 (SXM): the floors that are printed where no GPU is at hand.
H200_BANDWIDTH = 4.8e12
H200_BF16_RATE = 990e12
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


@dataclass(frozen=True)
class Line:
    """One way to compute one case, and the share of the floor's speed that it reaches."""

    op: str
    case: str
    way: str
    backend: str
    timing: Timing
    floor: float
    share: float


def floor_seconds(case: Case, bandwidth: float, rate: float) -> float:
    """The least time of a case, s: bytes over bandwidth (B/s) or operations over rate (1/s)."""
    return max(case.least_bytes / bandwidth, case.operations / rate)


def time_on_cpu(
    sets: Sequence[Mapping[str, Call]], samples: int, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Runs every way ``samples`` times in turn, each time on the next set of tensors."""
    names = list(sets[0])
    taken: dict[str, list[float]] = {name: [] for name in names}
    for index in range(samples + 1):
        ways = sets[index % len(sets)]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            began = clock()
            ways[name]()
            seconds = clock() - began
            if index > 0:  # the first call allocates and chooses kernels
                taken[name].append(seconds)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def time_on_gpu(sets: Sequence[Mapping[str, Call]], samples: int) -> dict[str, Timing]:
    """As on a CPU, but graphs between events, the cache overwritten before each."""
    names = list(sets[0])
    graphs: list[dict[str, torch.cuda.CUDAGraph]] = []
    for ways in sets:
        made = {}
        for name in names:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles, and lets libraries make their handles
                for _ in range(3):
                    ways[name]()
            torch.cuda.current_stream().wait_stream(side)
            made[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(made[name]):
                ways[name]()
        graphs.append(made)
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for index in range(samples + 3):
        ways_now = graphs[index % len(graphs)]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            pair[0].record()
            ways_now[name].replay()
            pair[1].record()
            if index >= 3:
                events[name].append(pair)
    torch.cuda.synchronize()
    return {
        name: Timing.of([begin.elapsed_time(end) / 1e3 for begin, end in pairs])
        for name, pairs in events.items()
    }


def copy_bandwidth(device: torch.device, samples: int = 20) -> float:
    """Bytes read plus bytes written per second of a large copy, B/s."""
    size = (2 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    ways = {"copy": lambda: target.copy_(source)}
    timed = time_on_gpu([ways], samples) if device.type == "cuda" else time_on_cpu([ways], samples)
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


def run_cases(
    chosen: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    rate: float,
    samples: int,
) -> list[Line]:
    """Times every way of every case."""
    lines = []
    for case in chosen:
        cold = 2 if device.type == "cuda" else max(1, min(4, COLD_BYTES // case.least_bytes))
        sets = [case.build(device, dtype) for _ in range(cold)]
        timed = time_on_gpu(sets, samples) if device.type == "cuda" else time_on_cpu(sets, samples)
        least = floor_seconds(case, bandwidth, rate)
        sizes = {"rows": 1, "width": 64, "head_width": 64}
        backend = KERNELS.chosen(case.op, Request(device.type, dtype, sizes)).backend
        for way, timing in timed.items():
            lines.append(
                Line(
                    case.op,
                    case.name,
                    way,
                    backend if way.startswith("ours") else "-",
                    timing,
                    1e6 * least,
                    1e6 * least / timing.p50,
                )
            )
        print(_text(lines[-len(timed) :]), flush=True)
    return lines


def linear_layers(samples: int, bandwidth: float) -> list[Line]:
    """Linear layers of a few rows on this CPU, by weight dtype and by the order of the factors."""
    lines = []
    for outputs, width in ((4096, 4096), (4864, 896), (896, 4864)):
        for rows in (1, 2, 4, 8):
            sets = [
                _linear_ways(outputs, width, rows)
                for _ in range(max(1, min(4, COLD_BYTES // (outputs * width))))
            ]
            for way, timing in time_on_cpu(sets, samples).items():
                size = {"float32": 4, "bfloat16": 2}.get(way.split(",")[0], 1)
                floor = outputs * width * size / bandwidth
                case = f"{outputs} x {width}, {rows} row" + ("s" if rows > 1 else "")
                lines.append(
                    Line("linear", case, way, "-", timing, 1e6 * floor, 1e6 * floor / timing.p50)
                )
            print(_text(lines[-6:]), flush=True)
    return lines


def _linear_ways(outputs: int, width: int, rows: int) -> dict[str, Call]:
    weight = torch.randn(outputs, width)
    half = weight.bfloat16()
    stored, scale = quantise(weight)
    x = torch.randn(rows, width)
    x_half = x.bfloat16()
    return {
        "float32, linear": lambda: linear(x, weight),
        "float32, W @ x.T": lambda: (weight @ x.T).T,
        "bfloat16, linear": lambda: linear(x_half, half),
        "bfloat16, W @ x.T": lambda: (half @ x_half.T).T,
        "int8, float32 x": lambda: int8_linear(x, stored, scale),
        "int8, bfloat16 x": lambda: int8_linear(x_half, stored, scale),
    }


def h200_floors(models: Sequence[str]) -> list[dict[str, Any]]:
    """What the data sheet of an H200 allows, bfloat16 (int8 where the op says so)."""
    floors = []
    for model in models:
        for case in cases(shapes_of(model), 2):
            seconds = floor_seconds(case, H200_BANDWIDTH, H200_BF16_RATE)
            bound = (
                "bytes" if seconds * H200_BANDWIDTH <= case.least_bytes * 1.001 else "arithmetic"
            )
            floors.append(
                {
                    "model": model,
                    "op": case.op,
                    "case": case.name,
                    "megabytes": round(case.least_bytes / 1e6, 3),
                    "floor_us": round(1e6 * seconds, 2),
                    "bound": bound,
                }
            )
    return floors


def _text(lines: Sequence[Line]) -> str:
    return "\n".join(
        f"{one.op:17}{one.case:24}{one.way:34}{one.timing.p50:11.1f} us{100 * one.share:7.1f} %"
        for one in lines
    )


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown tables."""
    out = [f"# Kernels, {figures['device']}, {figures['created']}", ""]
    out.append(
        f"Copy bandwidth {figures['copy_gb_s']:.0f} GB/s (bytes read plus written), "
        f"{figures['dtype']}, torch {torch.__version__}, Triton {figures['triton']}. "
        "Microseconds. Share: floor over median, the floor from the bandwidth and matrix rate "
        "measured in this run."
    )
    if figures["smallest_graph_us"] is not None:
        out.append(f"A graph of one addition takes {figures['smallest_graph_us']:.1f} us.")
    for title, lines in figures["tables"].items():
        out += ["", f"## {title}", ""]
        out.append("| op | case | way | backend | p20 | p50 | p80 | floor | share |")
        out.append("|---|---|---|---|---|---|---|---|---|")
        for one in lines:
            t = one["timing"]
            times = " | ".join(f"{value:.1f}" for value in (t["p20"], t["p50"], t["p80"]))
            names = " | ".join(one[key] for key in ("op", "case", "way", "backend"))
            out.append(f"| {names} | {times} | {one['floor']:.1f} | {100 * one['share']:.0f} % |")
    if figures["h200_floors"]:
        out += ["", "## Floors of an H200 by its data sheet (4.8 TB/s, 990 TFLOP/s)", ""]
        out += ["| model | op | case | MB | floor, us | bound by |", "|---|---|---|---|---|---|"]
        for one in figures["h200_floors"]:
            out.append("| " + " | ".join(str(value) for value in one.values()) + " |")
    return "\n".join(out) + "\n"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, ready for JSON."""
    from deliberate.environment import describe, load_average
    from deliberate.kernels.triton_support import HAS_TRITON, triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    models = arguments.model or (["qwen2.5-0.5b", "qwen2.5-7b"] if on_gpu else ["qwen2.5-0.5b"])
    before = load_average()
    copy = copy_bandwidth(device)
    bandwidth = copy if on_gpu else read_bandwidth()
    rate = matrix_rate(device)
    tables: dict[str, Any] = {}
    with torch.inference_mode():
        for model in models:
            chosen = [
                case
                for case in cases(
                    shapes_of(model), dtype.itemsize, tiles=on_gpu and arguments.tiles
                )
                if not arguments.op or case.op in arguments.op
            ]
            if not on_gpu:
                # The largest batches say nothing about a CPU that is not said by the small ones.
                chosen = [case for case in chosen if case.operations < 3e9]
            lines = run_cases(chosen, device, dtype, bandwidth, rate, arguments.samples)
            tables[model] = [asdict(one) for one in lines]
        if not on_gpu and not arguments.op:
            lines = linear_layers(arguments.samples, bandwidth)
            tables["linear layers on this CPU"] = [asdict(one) for one in lines]
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": torch.cuda.get_device_name() if on_gpu else describe()["cpu"],
        "dtype": str(dtype).removeprefix("torch."),
        "triton": triton.__version__ if HAS_TRITON else "not installed",
        "copy_gb_s": copy / 1e9,
        "floor_gb_s": bandwidth / 1e9,
        "smallest_graph_us": event_overhead(device),
        "matrix_tflop_s": None if rate == float("inf") else rate / 1e12,
        "load": {"before": before, "after": load_average()},
        "tables": tables,
        "h200_floors": [] if on_gpu else h200_floors(list(MODELS)[:2]),
        "environment": describe(),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Measures, prints and writes PREFIX.json and PREFIX.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help=f"shapes: {', '.join(MODELS)}")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--samples", type=int, default=40, help="timed runs of each way")
    parser.add_argument("--tiles", action="store_true", help="also time the candidate tiles")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args(given)
    try:
        if arguments.samples < 2:
            raise DeliberateError(f"--samples {arguments.samples}: at least 2 are needed")
        figures = measure(arguments)
    except DeliberateError as error:
        print(error, file=sys.stderr)
        return 2
    text = markdown(figures)
    if arguments.out is not None:
        from deliberate.storage import write_text

        write_text(arguments.out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
        write_text(arguments.out.with_suffix(".md"), text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
