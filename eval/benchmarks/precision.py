"""`deliberate bench precision`: what each layer loses at fewer bits, and mixed plans by that.

Every layer, and the head, is stored smaller by itself; the share of tokens that then differ from
the float model's choice is its sensitivity. Plans that a knapsack chooses from these are run whole
by the fused executor on texts that the sensitivities have not seen: agreement, negative
log-likelihood against float with a paired interval, and time of a decoding step, all plans in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.config import KVStorage
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
from deliberate.eval.statistics import bootstrap_ratio_of_medians
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.precision import assign
from deliberate.executors.quantization import Storage, WeightPlan, as_storage
from deliberate.executors.select import choose_executor
from deliberate.modeling.backbone import Backbone
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError

# What a nat of likelihood is worth beside a differing token, where few tokens differ.
_NLL_WEIGHT = 0.1
# Steps that are timed together.
_STEPS = 10


@dataclass(frozen=True)
class Read:
    """What a model makes of texts, one entry a text.

    Attributes:
        nll: mean negative log-likelihood of the solution's tokens, nats.
        choices: its most likely token at each of them.
        right: each of them is the solution's.
    """

    nll: list[float]
    choices: list[Tensor]
    right: list[bool]


@dataclass(frozen=True)
class Row:
    """One variant beside the float model.

    Attributes:
        bytes: of weights that a token reads.
        agreement: share of tokens with the same choice.
        nll, nll_change, nll_interval: mean, difference from float and its 95 % interval, paired.
        right, lost, gained: texts whose every token it would have chosen; those that float alone
            or it alone has so.
        ms: median of a decoding step; None where it was not timed.
        speed: float's time divided by its own, with its interval.
    """

    bytes: int
    agreement: float
    nll: float
    nll_change: float
    nll_interval: tuple[float, float]
    right: int
    lost: int
    gained: int
    ms: float | None = None
    speed: float | None = None
    speed_interval: tuple[float, float] | None = None


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench precision`` with overrides of `configs/bench_precision.yaml`.

    Raises:
        DeliberateError: settings that cannot work, or a model that the C++ kernels cannot run.
    """
    cfg = bench_config("bench_precision", arguments, verbatim=VERBATIM)
    all_at_least(cfg, {"limit": 4, "rounds": 8, "context": 1, "threads": 1})
    storages = [as_storage(one) for one in cfg.storages]
    if storages[0] is not Storage.NATIVE or len(storages) < 2:
        raise DeliberateError(
            f"storages={list(cfg.storages)}: native first, then smaller ones such as int4"
        )
    session = Session("precision", arguments, cfg.threads)
    task = command_task(cfg)
    source = str(cfg.model)
    tokenizer = checkpoint.load_tokenizer(source)
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
    made = [encoder.example(problem) for problem in task.problems]
    texts = [one for one in made if one is not None]
    half = len(texts) // 2
    if half < 2:
        raise DeliberateError(f"{len(texts)} texts: take more problems (limit=...)")
    base = _base(source)
    units = Backbone(base).num_layers + 1
    sizes, losses = sensitivities(base, storages, texts[:half])
    check_clock(cfg)
    float_bytes = sum(own[Storage.NATIVE] for own in sizes)
    plans: dict[str, WeightPlan] = {}
    for one in storages:
        plans[str(one)] = WeightPlan.build(units - 1, str(one))
    for share in cfg.budgets:
        chosen = assign(sizes, losses, share * float_bytes)
        plans[f"mixed {share:g}"] = WeightPlan(
            tuple(Storage(one) for one in chosen[:-1]), Storage(chosen[-1])
        )
    rows = _compare(base, plans, texts[half:], cfg)
    if cfg.kv:
        rows |= _eight_bit_keys(base, texts[half:])
    for other in cfg.others:
        rows |= _trained(str(other), storages[-1], base, texts[half:])
    session.end()
    _show(source, storages, losses, plans, rows)
    table_console().print(session.line())
    record = {
        "model": source,
        "texts": half,
        "losses": [{str(name): one for name, one in own.items()} for own in losses],
        "plans": {
            name: [str(one) for one in (*plan.layers, plan.head)] for name, plan in plans.items()
        },
        "rows": {name: asdict(row) for name, row in rows.items()},
    }
    session.write(cfg.out, record)


def sensitivities(
    base: Any, storages: Sequence[Storage], texts: Sequence[Example]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Bytes and losses of each layer, then the head, by storage, the others native.

    Bytes are those of all weights shared out evenly, less what the storage saves: sums are right.
    A loss is the share of tokens that differ from the float model's, and a tenth of the rise of the
    negative log-likelihood in nats where there is one.
    """
    depth = Backbone(base).num_layers
    plain = _fused(base, WeightPlan.build(depth))
    reference = read(plain, texts)
    sizes: list[dict[str, float]] = []
    losses: list[dict[str, float]] = []
    for unit in range(depth + 1):
        own_sizes, own_losses = {}, {}
        for storage in storages:
            layers = [Storage.NATIVE] * depth
            head = Storage.NATIVE
            if unit < depth:
                layers[unit] = storage
            else:
                head = storage
            backbone = _fused(base, WeightPlan(tuple(layers), head))
            saved = plain.bytes_per_token - backbone.bytes_per_token
            own_sizes[storage] = plain.bytes_per_token / (depth + 1) - saved
            found = reference if storage is Storage.NATIVE else read(backbone, texts)
            rise = statistics.fmean(found.nll) - statistics.fmean(reference.nll)
            own_losses[storage] = 1 - agreement(found, reference) + _NLL_WEIGHT * max(0.0, rise)
        sizes.append({str(name): one for name, one in own_sizes.items()})
        losses.append({str(name): one for name, one in own_losses.items()})
    return sizes, losses


@torch.inference_mode()
def read(
    backbone: Backbone, texts: Sequence[Example], storage: KVStorage = KVStorage.NATIVE
) -> Read:
    """What a model makes of each solution behind its question, in one pass a text."""
    nll, choices, right = [], [], []
    for text in texts:
        ids = torch.tensor([text.prompt + text.answer])
        count = ids.shape[1]
        cache = backbone.cache_maker(storage)(count, 1)
        ctx = backbone.context(0, count, device=backbone.device)
        states = backbone.run_layers(backbone.embed(ids, ctx), 0, backbone.num_layers, ctx, cache)
        logits = backbone.read_full_depth(states[0, len(text.prompt) - 1 : -1]).logits.float()
        target = torch.tensor(text.answer)
        chosen = logits.log_softmax(-1).gather(1, target[:, None])
        nll.append(-float(chosen.mean()))
        choices.append(logits.argmax(-1))
        right.append(bool((choices[-1] == target).all()))
    return Read(nll, choices, right)


def agreement(found: Read, reference: Read) -> float:
    """Share of tokens of all texts that both choose."""
    same = [one == other for one, other in zip(found.choices, reference.choices, strict=True)]
    return float(torch.cat(same).double().mean())


def compared(found: Read, reference: Read, held: int) -> Row:
    """A variant beside the float model, text by text."""
    change = np.asarray(found.nll) - np.asarray(reference.nll)
    draws = np.random.default_rng(0).integers(0, len(change), (2000, len(change)))
    low, high = np.percentile(change[draws].mean(axis=1), [2.5, 97.5])
    pairs = list(zip(found.right, reference.right, strict=True))
    return Row(
        bytes=held,
        agreement=agreement(found, reference),
        nll=statistics.fmean(found.nll),
        nll_change=float(change.mean()),
        nll_interval=(float(low), float(high)),
        right=sum(found.right),
        lost=pairs.count((False, True)),
        gained=pairs.count((True, False)),
    )


def _compare(
    base: Any, plans: Mapping[str, WeightPlan], texts: Sequence[Example], cfg: DictConfig
) -> dict[str, Row]:
    backbones = {name: _fused(base, plan) for name, plan in plans.items()}
    first = next(iter(backbones))
    reference = read(backbones[first], texts)
    clock = check_clock(cfg)
    steps = {name: _steps(one, cfg.context) for name, one in backbones.items()}
    times: dict[str, list[float]] = {name: [] for name in backbones}
    for turn, _, name in interleaved(range(cfg.rounds + 5), list(steps), warmup=5, title="steps"):
        seconds = timed(steps[name], clock)[1]
        if turn.counted:
            times[name].append(1000 * seconds / _STEPS)
    rows = {}
    for name, backbone in backbones.items():
        row = compared(read(backbone, texts), reference, backbone.bytes_per_token)
        speed = bootstrap_ratio_of_medians(times[first], times[name])
        interval = None
        if speed.interval is not None:
            interval = (speed.interval.low, speed.interval.high)
        rows[name] = Row(
            **{
                **asdict(row),
                "ms": statistics.median(times[name]),
                "speed": speed.value,
                "speed_interval": interval,
            }
        )
    return rows


def _eight_bit_keys(base: Any, texts: Sequence[Example]) -> dict[str, Row]:
    """Keys and values in 8 bits by transformers' modules, beside the same modules with floats."""
    backbone = Backbone(base)
    reference = read(backbone, texts)
    found = read(backbone, texts, KVStorage.INT8)
    held = sum(one.nbytes for one in backbone.layers.parameters())
    return {"keys and values int8": compared(found, reference, held)}


def _trained(name: str, storage: Storage, base: Any, texts: Sequence[Example]) -> dict[str, Row]:
    """Another checkpoint, float and rounded, beside the model."""
    depth = Backbone(base).num_layers
    reference = read(_fused(base, WeightPlan.build(depth)), texts)
    other = _base(name)
    rows = {}
    for one in (Storage.NATIVE, storage):
        backbone = _fused(other, WeightPlan.build(Backbone(other).num_layers, str(one)))
        found = read(backbone, texts)
        rows[f"{name} {one}"] = compared(found, reference, backbone.bytes_per_token)
    return rows


def _base(name: str) -> Any:
    source = checkpoint.resolve(name)
    saved = checkpoint.read_adaptive_config(source)
    return checkpoint.load_base(source if saved is None else saved.base).eval()


def _fused(base: Any, plan: WeightPlan) -> FusedBackbone:
    """The C++ executor, whose smaller matrices are copies.

    Raises:
        DeliberateError: it cannot run the model.
    """
    backbone, how = choose_executor(base, "fused", weights=plan)
    if not isinstance(backbone, FusedBackbone):
        raise DeliberateError(f"bench precision needs the fused executor: {how}")
    return backbone


@torch.inference_mode()
def _steps(backbone: FusedBackbone, context: int) -> Callable[[], None]:
    """Tokens chosen greedily one by one, each behind `context` others."""
    cache = backbone.new_cache(context + 8)
    ids = torch.randint(0, backbone.vocab_size, (1, context))
    ctx = backbone.context(0, context, device=backbone.device)
    backbone.run_layers(backbone.embed(ids, ctx), 0, backbone.num_layers, ctx, cache)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(_STEPS):
            cache.crop(context)
            own = backbone.context(context, 1, device=backbone.device)
            hidden = backbone.embed(ids[:, :1], own)
            hidden = backbone.run_layers(hidden, 0, backbone.num_layers, own, cache)
            int(backbone.read_full_depth(hidden[0, -1:]).logits.argmax())

    return run


def _show(
    source: str,
    storages: Sequence[Storage],
    losses: Sequence[Mapping[str, float]],
    plans: Mapping[str, WeightPlan],
    rows: Mapping[str, Row],
) -> None:
    console = table_console(120)
    table = Table(title=f"{source}: loss of one layer stored smaller, in 1,000 tokens")
    table.add_column("layer")
    for one in storages[1:]:
        table.add_column(str(one), justify="right")
    for unit, own in enumerate(losses):
        name = "head" if unit == len(losses) - 1 else str(unit + 1)
        table.add_row(name, *(f"{1000 * own[str(one)]:.2f}" for one in storages[1:]))
    console.print(table)
    table = Table(title="beside the float model, on other texts")
    for column in ("variant", "MB", "agreement", "nll", "change [95 %]", "texts right", "speed"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in rows.items():
        low, high = row.nll_interval
        speed = "-"
        if row.speed is not None and row.speed_interval is not None:
            speed = f"{row.speed:.2f} [{row.speed_interval[0]:.2f}, {row.speed_interval[1]:.2f}]"
        table.add_row(
            name,
            f"{row.bytes / 1e6:.2f}",
            f"{100 * row.agreement:.2f} %",
            f"{row.nll:.5f}",
            f"{row.nll_change:+.5f} [{low:+.5f}, {high:+.5f}]",
            f"{row.right} (-{row.lost}, +{row.gained})",
            speed,
        )
    console.print(table)
    for name, plan in plans.items():
        if name.startswith("mixed"):
            every = " ".join(map(str, (*plan.layers, plan.head)))
            console.print(f"{name}: {every}", soft_wrap=True)
