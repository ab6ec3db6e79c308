"""Floors of ops and of whole decoding steps on an H200, from its data sheet: nothing is measured.

A case cannot be faster than its bytes over the bandwidth of the memory, or its operations over the
rate of the matrix units (Williams et al., 2009, "Roofline").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deliberate.kernels.tools.bench_cases import Case, cases, shapes_of

# Data sheet of the H200 (SXM): the floors that are printed where no GPU is at hand.
H200_BANDWIDTH = 4.8e12
H200_BF16_RATE = 990e12


def floor_seconds(case: Case, bandwidth: float, rate: float) -> float:
    """The least time of a case, s: bytes over bandwidth (B/s) or operations over rate (1/s)."""
    return max(case.least_bytes / bandwidth, case.operations / rate)


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


def decode_floors(model: str) -> list[dict[str, Any]]:
    """Whole decoding steps of one token, bfloat16: every weight read once, on an H200."""
    of = shapes_of(model)
    heads = of.heads + 2 * of.kv
    layer = of.width * of.head_width * (heads + of.heads) + 3 * of.width * of.inner
    filled = (of.layers // 2) * 2 * of.kv * of.head_width * of.width
    head, half = of.vocab * of.width, of.layers // 2 * layer
    steps = {
        "every layer and the head": of.layers * layer + head,
        "half of the layers and the head": half + head,
        "half of the layers, the head, kv_fill of the others": half + head + filled,
        "half of the layers and a gate": half + of.width,
    }
    return [
        {
            "model": model,
            "op": "one token",
            "case": name,
            "megabytes": round(2 * weights / 1e6, 3),
            "floor_us": round(1e6 * 2 * weights / H200_BANDWIDTH, 2),
            "bound": "bytes",
        }
        for name, weights in steps.items()
    ]


def roofline(models: Sequence[str]) -> str:
    """The floors of an H200 by its data sheet as a Markdown table; measures nothing."""
    lines = ["| model | op | case | MB | floor, us | bound by |", "|---|---|---|---|---|---|"]
    for one in (*h200_floors(models), *(row for name in models for row in decode_floors(name))):
        lines.append("| " + " | ".join(str(value) for value in one.values()) + " |")
    return "\n".join(lines)
