"""`deliberate bench floor`: one decoding step of random models against reading their weights once.

A dense token at batch 1 cannot be faster than reading every weight once. The read is measured in
the same run, interleaved: a sum over each weight matrix, float32, one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from deliberate.eval.benchmarks.harness import Session, interleaved, timed
from deliberate.eval.benchmarks.settings import bench_config, mapped
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.backbone import Backbone
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench floor`` with overrides of `configs/bench_floor.yaml`.

    Raises:
        DeliberateError: an unknown model size or a count that cannot work.
    """
    cfg = bench_config("bench_floor", arguments, verbatim=("out",))
    sizes = mapped(cfg, "sizes")
    for name in cfg.models:
        if name not in sizes:
            raise DeliberateError(f"model {name!r} is unknown: one of {', '.join(sizes)}")
    all_at_least(cfg, {"rounds": 3, "context": 1, "threads": 1})
    session = Session("floor", arguments, cfg.threads)
    console = Console()
    figures = {name: _measure(cfg, name, sizes[name]) for name in cfg.models}
    for name, rows in figures.items():
        _show(name, rows, console)
    session.end()
    console.print(session.line(), highlight=False)
    session.write(cfg.out, {"models": figures})


def _measure(cfg: DictConfig, name: str, size: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a step by executor, and of the read."""
    torch.manual_seed(cfg.seed)
    config = LlamaConfig(
        **size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    backbones: dict[str, Backbone] = {"transformers' modules": Backbone(model)}
    compiled = 0.0
    for weights in (None, "bf16", "int8"):
        made = FusedBackbone(model, weights=weights)
        compiled += made.warm_up()
        backbones[f"fused, {weights or 'float32'}"] = made
    steps = {key: _step(backbone, cfg.context) for key, backbone in backbones.items()}
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]

    def read() -> None:
        for matrix in matrices:
            matrix.sum()

    runs = {"read": read} | steps
    times: dict[str, list[float]] = {key: [] for key in runs}
    with torch.inference_mode():
        rounds = range(cfg.rounds)
        for _, _, key in interleaved(rounds, list(runs), warmup=0, title=f"bench floor {name}"):
            times[key].append(1e3 * timed(runs[key])[1])
    medians = {key: statistics.median(values) for key, values in times.items()}
    held = sum(matrix.nbytes for matrix in matrices)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "gigabytes_per_second": held / medians["read"] / 1e6,
        "compile_seconds": compiled,
        "ms": medians,
        "times_the_read": {key: value / medians["read"] for key, value in medians.items()},
    }


@torch.inference_mode()
def _step(backbone: Backbone, context: int) -> Callable[[], None]:
    """One token behind `context` others, chosen greedily."""
    cache = backbone.new_cache(context + 8)
    ids = torch.randint(0, backbone.vocab_size, (1, context))
    ctx = backbone.context(0, context, device=backbone.device)
    backbone.run_layers(backbone.embed(ids, ctx), 0, backbone.num_layers, ctx, cache)

    def run() -> None:
        cache.crop(context)
        own = backbone.context(context, 1, device=backbone.device)
        hidden = backbone.embed(ids[:, :1], own)
        hidden = backbone.run_layers(hidden, 0, backbone.num_layers, own, cache)
        int(backbone.logits(hidden[:, -1]).argmax())

    return run


def _show(name: str, rows: dict[str, Any], console: Console) -> None:
    title = f"{name}: {rows['parameters'] / 1e6:.1f}M parameters"
    table = Table(title=f"{title}, read at {rows['gigabytes_per_second']:.1f} GB/s")
    for column in ("step", "median ms", "times the float32 read"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for key, value in rows["ms"].items():
        table.add_row(key, f"{value:.2f}", f"{rows['times_the_read'][key]:.2f}")
    console.print(table)
