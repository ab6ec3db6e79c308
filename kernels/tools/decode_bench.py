"""`python -m deliberate.kernels.tools.decode_bench`: one token of a random 0.5B model, against its
floors.

Random weights in the sizes of Qwen2.5-0.5B: what a token costs does not depend on what they say,
and whether it exits is set by the threshold. Needs no configuration files and no checkpoint. On a
CPU the same program runs, with small sizes, to show that it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deliberate.cost.model import CostModel
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.kernels.backends import describe
from deliberate.kernels.tools.decode_cases import (
    SIZES,
    VARIANTS,
    DecodeBench,
    Line,
    Variant,
    random_model,
)
from deliberate.kernels.tools.timing import copy_bandwidth, read_bandwidth
from deliberate.utils.environment import load_average
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text


def run(
    bench: DecodeBench, variants: Sequence[Variant], rounds: int, bandwidth: float, seconds: float
) -> tuple[list[Line], dict[str, str]]:
    """Times the ways; one that fails is named, with its reason, and the next one runs."""
    lines: list[Line] = []
    failed: dict[str, str] = {}
    costs: dict[str, CostModel] = {}
    expected: dict[int, list[list[int]]] = {}
    began = bench.clock()
    for variant in variants:
        if bench.clock() - began > seconds:
            failed[variant.name] = "no time was left"
            continue
        try:
            cost = None
            if variant.executor == "cuda" and variant.batch == 1 and not variant.multi_step:
                if variant.executor not in costs:
                    costs[variant.executor] = bench.cost(variant.executor, seconds / 8)
                cost = costs[variant.executor]
            known = expected.get(variant.batch) if variant.executor == "cuda" else None
            line, made = bench.line(variant, rounds, bandwidth, cost, known)
            if variant.executor == "generic":
                expected[variant.batch] = made
            lines.append(line)
            print(text(line), flush=True)
        except Exception as error:  # the rest of a session is worth more than this way
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failed[variant.name] = f"{type(error).__name__}: {reason[:200]}"
            print(f"{variant.name}: {failed[variant.name]}", flush=True)
    for name, (backbone, _) in bench.pairs.items():
        if isinstance(backbone, CudaFusedBackbone) and backbone.captures.reason is not None:
            failed[f"graphs of {name}"] = backbone.captures.reason
    return lines, failed


def text(line: Line) -> str:
    """A line for reading while it runs."""
    share = 100 * line.floor_ms / line.ms_per_token
    said = "" if line.predicted_ms is None else f"  cost model {line.predicted_ms:.3f}"
    floor = f"floor {line.floor_ms:.3f} ({share:.0f} %)"
    return f"{line.variant:36}{line.ms_per_token:9.3f} ms  {floor}{said}"


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    out = [
        f"# Decoding, {figures['device']}, {figures['created']}",
        "",
        f"Random weights, size {figures['size']}, {figures['dtype']}, {figures['tokens']} tokens "
        f"behind {figures['prompt']}, medians of {figures['rounds']}; floor: weights over "
        f"{figures['bandwidth_gb_s']:.0f} GB/s measured in this run.",
        "",
        "| variant | ms/token | low-high | floor | share | cost model | off | layers | discarded "
        "| agrees |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in figures["lines"]:
        took, said = one["ms_per_token"], one["predicted_ms"]
        agrees = "-" if one["agrees"] is None else f"{one['agrees']:.1%}"
        out.append(
            f"| {one['variant']} | {took:.3f} | {one['low']:.3f}-{one['high']:.3f} | "
            f"{one['floor_ms']:.3f} | {one['floor_ms'] / took:.0%} | "
            + ("- | - | " if said is None else f"{said:.3f} | {said / took - 1:+.0%} | ")
            + f"{one['layers_per_token']:.2f} | {one['discarded']:.3f} | {agrees} |"
        )
    out += [f"\nNot measured: {name}: {reason}" for name, reason in figures["failed"].items()]
    return "\n".join(out) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes OUT.json and OUT.md; status 1 where a way failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="0.5b", help=f"of the model: {', '.join(SIZES)}")
    parser.add_argument("--tokens", type=int, default=129, help="of each generation")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="generations of each way")
    parser.add_argument("--seconds", type=float, default=80, help="no way is begun after them")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    before = load_average()
    try:
        for name, least in (("tokens", 2), ("prompt", 1), ("rounds", 1)):
            if getattr(arguments, name) < least:
                raise DeliberateError(f"--{name} {getattr(arguments, name)}: at least {least}")
        model = random_model(arguments.size, dtype, device)
    except DeliberateError as error:
        print(error, file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth(device) if on_gpu else read_bandwidth()
    bench = DecodeBench(
        model, ops=None if on_gpu else True, tokens=arguments.tokens, prompt=arguments.prompt
    )
    lines, failed = run(bench, VARIANTS, arguments.rounds, bandwidth, arguments.seconds)
    figures = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": torch.cuda.get_device_name() if on_gpu else describe()["cpu"],
        "size": arguments.size,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": arguments.tokens,
        "prompt": arguments.prompt,
        "rounds": arguments.rounds,
        "bandwidth_gb_s": bandwidth / 1e9,
        "lines": [asdict(line) for line in lines],
        "failed": failed,
        "load": {"before": before, "after": load_average()},
        "environment": describe(),
    }
    if arguments.out is None:
        print(markdown(figures))
    else:
        write_text(arguments.out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
        write_text(arguments.out.with_suffix(".md"), markdown(figures))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
