"""`python -m deliberate.kernels.tools.bench`: each kernel's time against its floor and its rivals.

On a GPU every way is captured in a CUDA graph and replayed after the L2 cache is overwritten, over
rotating sets of tensors, between events; a device-to-device copy measured beside it gives the
bandwidth of the floor. On a CPU the torch references run and linear layers with float32, bfloat16
and int8 weights are compared, and the floors of an H200 are computed from its data sheet. Ways are
interleaved, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from deliberate.kernels.ops.int8_linear import int8_linear, quantise
from deliberate.kernels.registry import KERNELS, SMALL, KernelRequest
from deliberate.kernels.tools.bench_cases import MODELS, Call, Case, cases, shapes_of
from deliberate.kernels.tools.roofline import floor_seconds, roofline
from deliberate.kernels.tools.timing import (
    COLD_BYTES,
    Timing,
    copy_bandwidth,
    event_overhead,
    matrix_rate,
    read_bandwidth,
    time_on_cpu,
    time_on_gpu,
)
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Line:
    """One way to compute one case, and the share of the floor's speed that it reaches."""

    op: str
    case: str
    variant: str
    backend: str
    timing: Timing
    floor: float
    share: float


def run_cases(
    chosen: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    rate: float,
    samples: int,
    until: float = math.inf,
    failed: dict[str, str] | None = None,
) -> list[Line]:
    """Times every way of every case.

    Args:
        until: no case is begun after this moment of `time.monotonic`.
        failed: gets a line for every case that was not timed, and why; without it an error ends
            the run.
    """
    lines: list[Line] = []
    for case in chosen:
        if time.monotonic() > until:
            if failed is not None:
                failed[f"{case.op}, {case.name}"] = "no time was left"
            continue
        try:
            made = _run_case(case, device, dtype, bandwidth, rate, samples)
        except Exception as error:
            if failed is None:
                raise
            # Every case after it is still worth timing; what failed stands in the record.
            first = (str(error).strip().splitlines() or [""])[0]
            reason = failed[f"{case.op}, {case.name}"] = f"{type(error).__name__}: {first[:200]}"
            print(f"{case.op}, {case.name}: {reason}", flush=True)
            continue
        lines += made
        print(_text(made), flush=True)
    return lines


def _run_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    rate: float,
    samples: int,
) -> list[Line]:
    """One line for each way of one case."""
    cold = 2 if device.type == "cuda" else max(1, min(4, COLD_BYTES // case.least_bytes))
    sets = [case.build(device, dtype) for _ in range(cold)]
    timed = time_on_gpu(sets, samples) if device.type == "cuda" else time_on_cpu(sets, samples)
    least = 1e6 * floor_seconds(case, bandwidth, rate)
    backend = KERNELS.chosen(case.op, KernelRequest(device.type, dtype, SMALL)).backend
    return [
        Line(
            case.op,
            case.name,
            variant,
            backend if variant.startswith("ours") else "-",
            timing,
            least,
            least / timing.p50,
        )
        for variant, timing in timed.items()
    ]


def linear_layers(samples: int, bandwidth: float) -> list[Line]:
    """Linear layers of a few rows on this CPU, by weight dtype and by the order of the factors."""
    lines = []
    for outputs, width in ((4096, 4096), (4864, 896), (896, 4864)):
        for rows in (1, 2, 4, 8):
            sets = [
                _linear_variants(outputs, width, rows)
                for _ in range(max(1, min(4, COLD_BYTES // (outputs * width))))
            ]
            for variant, timing in time_on_cpu(sets, samples).items():
                size = {"float32": 4, "bfloat16": 2}.get(variant.split(",")[0], 1)
                floor = outputs * width * size / bandwidth
                case = f"{outputs} x {width}, {rows} row" + ("s" if rows > 1 else "")
                lines.append(
                    Line(
                        "linear", case, variant, "-", timing, 1e6 * floor, 1e6 * floor / timing.p50
                    )
                )
            print(_text(lines[-6:]), flush=True)
    return lines


def _linear_variants(outputs: int, width: int, rows: int) -> dict[str, Call]:
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


def _text(lines: Sequence[Line]) -> str:
    return "\n".join(
        f"{one.op:17}{one.case:24}{one.variant:34}{one.timing.p50:11.1f} us{100 * one.share:7.1f} %"
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
            names = " | ".join(one[key] for key in ("op", "case", "variant", "backend"))
            out.append(f"| {names} | {times} | {one['floor']:.1f} | {100 * one['share']:.0f} % |")
    out += [f"\nNot measured: {name}: {reason}" for name, reason in figures["failed"].items()]
    if figures["h200_floors"]:
        out += ["", "## Floors of an H200 by its data sheet (4.8 TB/s, 990 TFLOP/s)", ""]
        out.append(figures["h200_floors"])
    return "\n".join(out) + "\n"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, ready for JSON."""
    from deliberate.kernels.backends import describe
    from deliberate.kernels.triton_support import HAS_TRITON, triton
    from deliberate.utils.environment import load_average

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    models = arguments.model or (["qwen2.5-0.5b", "qwen2.5-7b"] if on_gpu else ["qwen2.5-0.5b"])
    before = load_average()
    copy = copy_bandwidth(device)
    bandwidth = copy if on_gpu else read_bandwidth()
    rate = matrix_rate(device)
    tables: dict[str, Any] = {}
    failed: dict[str, str] = {}
    until = time.monotonic() + arguments.seconds
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
            missed: dict[str, str] = {}
            lines = run_cases(
                chosen, device, dtype, bandwidth, rate, arguments.samples, until, missed
            )
            failed |= {f"{model}, {name}": reason for name, reason in missed.items()}
            tables[model] = [asdict(one) for one in lines]
        if not on_gpu and not arguments.op and time.monotonic() < until:
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
        "failed": failed,
        "h200_floors": "" if on_gpu else roofline(list(MODELS)[:2]),
        "environment": describe(),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Measures, prints and writes PREFIX.json and PREFIX.md; status 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help=f"shapes: {', '.join(MODELS)}")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--samples", type=int, default=40, help="timed runs of each way")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no case is begun after them"
    )
    parser.add_argument("--tiles", action="store_true", help="also time the candidate tiles")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument(
        "--roofline", action="store_true", help="only the floors of an H200; measures nothing"
    )
    arguments = parser.parse_args(given)
    try:
        if arguments.samples < 2:
            raise DeliberateError(f"--samples {arguments.samples}: at least 2 are needed")
        if arguments.roofline:
            print(roofline(arguments.model or ["qwen2.5-0.5b"]))
            return 0
        figures = measure(arguments)
    except DeliberateError as error:
        print(error, file=sys.stderr)
        return 2
    text = markdown(figures)
    if arguments.out is not None:
        from deliberate.utils.files import write_text

        write_text(arguments.out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
        write_text(arguments.out.with_suffix(".md"), text)
    else:
        print(text)
    return 1 if any("Error" in reason for reason in figures["failed"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
