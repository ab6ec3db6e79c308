"""`deliberate bench skip`: how much of the MLPs and of attention could a token go without?

Rows of an MLP, or heads of attention, are left out token by token and layer by layer, and what is
chosen then is compared with the whole model's choices:

- ``rows, known``: those that add least to the layer's output, known only when all of it has been
  computed: the bound of every predictor (Deja Vu, arXiv:2310.17157).
- ``rows, by gate``: those with the smallest gate, known after a third of the MLP (CATS,
  arXiv:2404.08763): up and down need the other rows alone.
- ``rows, fixed`` and ``heads, fixed``: those that added least on other text, the same for all
  tokens: nothing has to be predicted.
- ``heads, known``: as rows.

What such skipping would save at most follows from the measured times of whole and shortened
products: shortened matrices lie in one piece here, where a kernel would have to pick their rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.api import checkpoint
from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.harness import (
    UNBOUNDED,
    Session,
    check_clock,
    interleaved,
    table_console,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.benchmarks.teacher_forced import Read, Row, compared, read
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.modeling.backbone import Backbone
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError

_STEPS = 10

# Of a layer and the input of its last product, what is left out: bool [..., count].
Chosen = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Unit:
    """What is left out of one layer: rows of its MLP, or heads of its attention.

    Attributes:
        product: the linear module whose input is cut: ``down_proj`` or ``o_proj``.
        count: rows or heads.
        gate, activation: the MLP's gate and what is taken of it, for rows.
    """

    product: nn.Linear
    count: int
    gate: nn.Linear | None = None
    activation: Callable[[Tensor], Tensor] = F.silu

    def added(self, values: Tensor) -> Tensor:
        """Norm of what each row or head adds to the output, ``[..., count]``, of an input of the
        product ``[..., in_features]``."""
        weight = self.product.weight.detach()
        if self.gate is not None:
            return values.abs() * weight.norm(dim=0)
        width = values.shape[-1] // self.count
        heads = values.unflatten(-1, (self.count, width))
        parts = weight.unflatten(1, (self.count, width))
        return torch.einsum("...hd,ohd->...ho", heads, parts).norm(dim=-1)

    def cut(self, values: Tensor, least: Tensor) -> Tensor:
        """The input with these rows or heads, bool ``[..., count]``, at zero."""
        width = values.shape[-1] // self.count
        return values.masked_fill(least.repeat_interleave(width, dim=-1), 0.0)


def units(backbone: Backbone) -> dict[str, list[Unit]]:
    """Rows and heads of every layer.

    Raises:
        DeliberateError: layers that are not built as Llama's.
    """
    rows, heads = [], []
    for layer in backbone.layers:
        mlp, attention = getattr(layer, "mlp", None), getattr(layer, "self_attn", None)
        down, gate = getattr(mlp, "down_proj", None), getattr(mlp, "gate_proj", None)
        out = getattr(attention, "o_proj", None)
        if not (
            isinstance(down, nn.Linear)
            and isinstance(gate, nn.Linear)
            and isinstance(out, nn.Linear)
        ):
            raise DeliberateError(
                f"bench skip reads layers with mlp.gate_proj, mlp.down_proj and self_attn.o_proj; "
                f"those of {backbone.architecture!r} have others: take a Llama-like model"
            )
        rows.append(Unit(down, down.in_features, gate, getattr(mlp, "act_fn", F.silu)))
        heads.append(Unit(out, backbone.config.num_attention_heads))
    return {"rows": rows, "heads": heads}


@contextmanager
def without(every: Sequence[Unit], choose: Chosen) -> Iterator[None]:
    """While the block runs, each layer goes without what `choose(layer, input)` says."""

    def hook(number: int, unit: Unit) -> Any:
        def changed(_module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            return unit.cut(given[0], choose(number, given[0]))

        return unit.product.register_forward_pre_hook(changed)

    handles = [hook(number, unit) for number, unit in enumerate(every)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def smallest(scores: Tensor, share: float) -> Tensor:
    """Bool like the scores: the `share` of the last dimension that is smallest."""
    count = int(share * scores.shape[-1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        chosen.scatter_(-1, scores.topk(count, dim=-1, largest=False).indices, True)
    return chosen


def averages(backbone: Backbone, every: Sequence[Unit], texts: Sequence[Example]) -> list[Tensor]:
    """Root mean square of what each row or head added on these texts, ``[count]`` a layer."""
    sums = [torch.zeros(unit.count, dtype=torch.float64) for unit in every]
    nothing = [torch.zeros(unit.count, dtype=torch.bool) for unit in every]

    def seen(number: int, values: Tensor) -> Tensor:
        sums[number] += every[number].added(values).double().square().flatten(0, -2).sum(0).cpu()
        return nothing[number].to(values.device)

    with without(every, seen):
        read(backbone, texts)
    return [one.sqrt() for one in sums]


def variants(
    backbone: Backbone, texts: Sequence[Example]
) -> Mapping[str, tuple[list[Unit], Callable[[float], Chosen]]]:
    """What is left out, and for each share how it is chosen."""
    found = units(backbone)
    rows, heads = found["rows"], found["heads"]
    gates: dict[int, Tensor] = {}
    for number, unit in enumerate(rows):
        assert unit.gate is not None

        def keep(
            _module: Any, _given: Any, out: Tensor, number: int = number, unit: Unit = unit
        ) -> None:
            gates[number] = unit.activation(out).abs()

        unit.gate.register_forward_hook(keep)
    usual = {name: averages(backbone, own, texts) for name, own in found.items()}

    def known(own: list[Unit]) -> Any:
        return lambda share: lambda number, x: smallest(own[number].added(x), share)

    def fixed(name: str) -> Any:
        return lambda share: lambda number, x: smallest(usual[name][number].to(x), share)

    return {
        "rows, known": (rows, known(rows)),
        "rows, by gate": (rows, lambda share: lambda number, _: smallest(gates[number], share)),
        "rows, fixed": (rows, fixed("rows")),
        "heads, known": (heads, known(heads)),
        "heads, fixed": (heads, fixed("heads")),
    }


def without_loss(rows: Mapping[float, Row], least: float, most: float) -> float:
    """The largest share up to which nothing is lost, 0 where there is none.

    Args:
        least: agreement with the whole model.
        most: nats a token that may be lost, at the upper end of the interval.
    """
    found = 0.0
    for share in sorted(rows):
        row = rows[share]
        if row.agreement < least or row.nll_interval[1] > most:
            break
        found = share
    return found


def products(backbone: Backbone, shares: Sequence[float], cfg: DictConfig) -> dict[float, float]:
    """Seconds of an MLP's up and down products for one token by the share that is left out."""
    mlp: Any = backbone.layers[0].mlp
    up, down = mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach()
    x = torch.randn(1, up.shape[1], dtype=up.dtype)
    clock = check_clock(cfg)

    def run(share: float) -> Callable[[], None]:
        kept = up.shape[0] - int(share * up.shape[0])
        # As many copies as there are layers: otherwise they would lie in the processor's cache.
        pairs = [
            (up[:kept].clone(), down[:, :kept].contiguous()) for _ in range(backbone.num_layers)
        ]

        @torch.inference_mode()
        def once() -> None:
            for _ in range(_STEPS):
                for first, second in pairs:
                    F.linear(F.linear(x, first), second)

        return once

    runs = {share: run(share) for share in (0.0, *shares)}
    times: dict[float, list[float]] = {share: [] for share in runs}
    for turn, _, share in interleaved(range(cfg.rounds + 2), list(runs), warmup=2, title="times"):
        seconds = timed(runs[share], clock)[1]
        if turn.counted:
            times[share].append(seconds / _STEPS)
    return {share: statistics.median(own) for share, own in times.items()}


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench skip`` with overrides of `configs/bench_skip.yaml`.

    Raises:
        DeliberateError: settings that cannot work, or a model that is not built as Llama is.
    """
    cfg = bench_config("bench_skip", arguments, verbatim=VERBATIM)
    all_at_least(cfg, {"limit": 4, "rounds": 4, "threads": 1})
    shares = [float(one) for one in cfg.shares]
    if not shares or not all(0 < one < 1 for one in shares):
        raise DeliberateError(f"shares={shares}: give shares between 0 and 1, e.g. [0.1, 0.3]")
    check_clock(cfg)
    session = Session("skip", arguments, cfg.threads)
    task = command_task(cfg)
    source = checkpoint.resolve(str(cfg.model))
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
    made = [encoder.example(problem) for problem in task.problems]
    texts = [one for one in made if one is not None]
    half = len(texts) // 2
    if half < 2:
        raise DeliberateError(f"{len(texts)} texts: take more problems (limit=...)")
    saved = checkpoint.read_adaptive_config(source)
    backbone = Backbone(checkpoint.load_base(source if saved is None else saved.base).eval())
    found = compare(backbone, texts[:half], texts[half:], shares)
    times = products(backbone, shares, cfg)
    session.end()
    safe = {
        name: without_loss(own, float(cfg.agreement), float(cfg.nats))
        for name, own in found.items()
    }
    _show(cfg, found, safe, times)
    table_console(110).print(session.line(str(cfg.clock)))
    session.write(
        cfg.out,
        {
            "model": str(cfg.model),
            "texts": len(texts) - half,
            "without_loss": safe,
            "seconds": {str(share): one for share, one in times.items()},
            "rows": {
                name: {str(share): asdict(row) for share, row in own.items()}
                for name, own in found.items()
            },
        },
    )


def compare(
    backbone: Backbone,
    averaged: Sequence[Example],
    judged: Sequence[Example],
    shares: Sequence[float],
) -> dict[str, dict[float, Row]]:
    """Each variant at each share beside the whole model, on texts that no average has seen."""
    reference: Read = read(backbone, judged)
    rows: dict[str, dict[float, Row]] = {}
    for name, (own, chosen) in variants(backbone, averaged).items():
        rows[name] = {}
        for share in shares:
            if int(share * own[0].count) == 0:
                continue  # not one of so few heads
            with without(own, chosen(share)):
                rows[name][share] = compared(read(backbone, judged), reference, 0)
    return rows


def _show(
    cfg: DictConfig,
    found: Mapping[str, Mapping[float, Row]],
    safe: Mapping[str, float],
    times: Mapping[float, float],
) -> None:
    table = Table(title=f"{cfg.model}: left out of every layer, beside the whole model")
    for column in ("left out", "share", "agreement", "nats lost [95 %]"):
        table.add_column(column, justify="left" if column == "left out" else "right")
    for name, own in found.items():
        for share, row in own.items():
            low, high = row.nll_interval
            table.add_row(
                name,
                f"{100 * share:.0f} %",
                f"{100 * row.agreement:.2f} %",
                f"{row.nll_change:+.4f} [{low:+.4f}, {high:+.4f}]",
            )
    console = table_console(110)
    console.print(table)
    for name, share in safe.items():
        console.print(
            f"{name}: {100 * share:.0f} % without loss (agreement {100 * cfg.agreement:g} %, "
            f"{cfg.nats:g} nats)"
        )
    whole = times[0.0]
    parts = ", ".join(
        f"{100 * share:.0f} % {1e6 * own:.0f} us ({whole / own:.2f}x)"
        for share, own in times.items()
    )
    console.print(f"up and down of all layers, one token: {parts}", soft_wrap=True)
