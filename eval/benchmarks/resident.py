"""`deliberate bench resident`: how much memory do the tokens of an answer read?

Layers that no token reaches could be left on disk. Linux marks the pages that a process touches
(``/proc/self/clear_refs``, ``smaps``); the marks are cleared after the prompt, so those left are of
what the answer's tokens read, weights above all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Pages:
    """Bytes of pages in memory, and of those touched since the marks were cleared."""

    resident: int
    touched: int


def pages(smaps: str) -> Pages:
    """Sums over all regions of a text in the form of ``/proc/PID/smaps``."""
    sums = {"Rss": 0, "Referenced": 0}
    for line in smaps.splitlines():
        key, _, value = line.partition(":")
        if key in sums:
            sums[key] += 1024 * int(value.split()[0])
    return Pages(sums["Rss"], sums["Referenced"])


class _MarksCleared:
    """A streamer that clears the marks when the first token of the answer comes."""

    def __init__(self) -> None:
        self._calls = 0

    def put(self, _tokens: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call is the prompt
            Path("/proc/self/clear_refs").write_text("1")

    def end(self) -> None:
        """Nothing is held back."""


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench resident`` with overrides of `configs/bench_resident.yaml`.

    Raises:
        DeliberateError: settings that cannot work, or a system that does not mark pages.
    """
    cfg = bench_config("bench_resident", arguments, verbatim=("model", "out"))
    all_at_least(cfg, {"prompt_tokens": 1, "answer_tokens": 2, "threads": 1})
    if not Path("/proc/self/clear_refs").exists():
        raise DeliberateError("bench resident reads /proc/self/smaps, which Linux alone has")
    session = Session("resident", arguments, cfg.threads)
    model = AdaptiveModel.from_pretrained(
        str(cfg.model), executor=str(cfg.executor), weights=str(cfg.weights)
    ).eval()
    torch.manual_seed(cfg.seed)
    ids = torch.randint(0, model.backbone.vocab_size, (1, int(cfg.prompt_tokens)))
    lowest = torch.finfo(torch.float32).tiny
    variants: dict[str, dict[str, Any]] = {"dense": {"fidelity": "dense"}}
    for most in cfg.max_pending:
        variants[f"threshold, {most} may be pending"] = {
            "fidelity": "threshold",
            "thresholds": lowest,
            "online": False,
            "max_pending": int(most),
        }
    found: dict[str, Pages] = {}
    for name, how in variants.items():
        for _ in range(2):  # the first builds what is built once
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(cfg.answer_tokens),
                do_sample=False,
                eos_token_id=None,
                streamer=_MarksCleared(),
                **how,
            )
        found[name] = pages(Path("/proc/self/smaps").read_text())
    session.end()
    table = Table(title=f"{cfg.model}: memory, exits {list(model.exit_config.layers)}")
    for column in ("decoding", "in memory", "read by the answer's tokens"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    for name, own in found.items():
        table.add_row(name, f"{own.resident / 1e6:.0f} MB", f"{own.touched / 1e6:.0f} MB")
    console = table_console(110)
    console.print(table)
    console.print(session.line())
    session.write(cfg.out, {"pages": {name: asdict(own) for name, own in found.items()}})
