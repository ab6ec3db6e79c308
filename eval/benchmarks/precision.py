"""`deliberate bench precision`: what each layer loses at fewer bits, and mixed plans by that.

Every layer, and the head, is stored smaller by itself; the share of tokens that then differ from
the float model's choice is its sensitivity. Plans that a knapsack chooses from these are run whole
by the fused executor on texts that the sensitivities have not seen: agreement, what is right and
negative log-likelihood against float with paired intervals, and time of a decoding step, all plans
in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

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
from deliberate.eval.benchmarks.teacher_forced import (
    Row,
    agreement,
    compared,
    every_state,
    read,
    read_from,
)
from deliberate.eval.statistics import bootstrap_ratio_of_medians
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.static_cache import StaticCache
from deliberate.executors.precision import assign
from deliberate.executors.quantization import Storage, WeightPlan, as_storage
from deliberate.executors.rotation import rotate_residual
from deliberate.executors.select import choose_executor
from deliberate.modeling.backbone import Backbone
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError

# What a nat of likelihood is worth beside a differing token, where few tokens differ.
_NLL_WEIGHT = 0.1
_KV = "keys and values int8"
# Steps that are timed together.
_STEPS = 10


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
    searched = len(texts) // 2 if cfg.search is None else int(cfg.search)
    if not cfg.budgets:
        searched = 0  # no plan is looked for
    if (cfg.budgets and searched < 2) or len(texts) - searched < 2:
        raise DeliberateError(
            f"{len(texts)} texts, {searched} of them for sensitivities: at least 2 of each kind "
            "are needed (limit=..., search=...)"
        )
    base = _base(source)
    if cfg.rotate:
        rotate_residual(base, seed=int(cfg.seed))
    units = Backbone(base).num_layers + 1
    sizes, losses = sensitivities(base, storages, texts[:searched]) if cfg.budgets else ([], [])
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
    rows = _compare(_variants(base, plans, kv=bool(cfg.kv)), texts[searched:], cfg)
    for other in cfg.others:
        rows |= _trained(str(other), storages[-1], base, texts[searched:])
    session.end()
    _show(source, storages, losses, plans, rows, len(texts) - searched)
    table_console().print(session.line())
    record = {
        "model": source,
        "texts": {"sensitivities": searched, "figures": len(texts) - searched},
        "rotated": bool(cfg.rotate),
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

    Layers below a unit are not run again: their states are those of the float model. Bytes are
    those of all weights shared out evenly, less what the storage saves: sums are right. A loss is
    the share of tokens that differ from the float model's, and a tenth of the rise of the
    negative log-likelihood in nats where there is one.
    """
    depth = Backbone(base).num_layers
    plain = _fused(base, WeightPlan.build(depth))
    states = [every_state(plain, text) for text in texts]
    reference = read_from(plain, texts, [one[depth] for one in states], depth)
    sizes: list[dict[str, float]] = []
    losses: list[dict[str, float]] = []
    for unit in tqdm(range(depth + 1), desc="sensitivities", leave=False):
        before = [one[unit] for one in states]
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
            found = reference
            if storage is not Storage.NATIVE:
                found = read_from(backbone, texts, before, unit)
            rise = statistics.fmean(found.nll) - statistics.fmean(reference.nll)
            own_losses[storage] = 1 - agreement(found, reference) + _NLL_WEIGHT * max(0.0, rise)
        sizes.append({str(name): one for name, one in own_sizes.items()})
        losses.append({str(name): one for name, one in own_losses.items()})
    return sizes, losses


@dataclass(frozen=True)
class Variant:
    """Weights by a plan, and how keys and values are kept."""

    backbone: FusedBackbone
    storage: KVStorage = KVStorage.NATIVE


def _variants(base: Any, plans: Mapping[str, WeightPlan], *, kv: bool) -> dict[str, Variant]:
    """Each plan; with `kv` those of one storage also with keys and values in 8 bits."""
    made = {name: Variant(_fused(base, plan)) for name, plan in plans.items()}
    if kv:
        for name in [name for name, plan in plans.items() if len(set(plan.layers)) == 1]:
            made[f"{name}, {_KV}"] = Variant(made[name].backbone, KVStorage.INT8)
    return made


def _compare(variants: Mapping[str, Variant], texts: Sequence[Example], cfg: Any) -> dict[str, Row]:
    """Every variant beside the first: read, and timed in turn."""
    first = next(iter(variants))
    reference = read(variants[first].backbone, texts)
    clock = check_clock(cfg)
    steps = {name: _steps(one, cfg.context) for name, one in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn, _, name in interleaved(range(cfg.rounds + 5), list(steps), warmup=5, title="steps"):
        seconds = timed(steps[name], clock)[1]
        if turn.counted:
            times[name].append(1000 * seconds / _STEPS)
    rows = {}
    for name, one in variants.items():
        found = reference if name == first else read(one.backbone, texts, one.storage)
        row = compared(found, reference, one.backbone.bytes_per_token)
        speed = bootstrap_ratio_of_medians(times[first], times[name])
        interval = None
        if speed.interval is not None:
            interval = (speed.interval.low, speed.interval.high)
        rows[name] = replace(
            row,
            cache_bytes=_cache_bytes(one),
            ms=statistics.median(times[name]),
            speed=speed.value,
            speed_interval=interval,
        )
    return rows


def _cache_bytes(variant: Variant) -> int:
    """Of the keys and values of one token."""
    cache = variant.backbone.cache_maker(variant.storage)(1, 1)
    assert isinstance(cache, StaticCache)
    pairs = cache.buffers(0, cache.num_layers)
    return sum(one[:, :, :1].nbytes for pair in pairs for one in pair)


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
def _steps(variant: Variant, context: int) -> Callable[[], None]:
    """Tokens chosen greedily one by one, each behind `context` others."""
    backbone = variant.backbone
    cache = backbone.cache_maker(variant.storage)(context + 8, 1)
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
    count: int,
) -> None:
    console = table_console(160)
    table = Table(title=f"{source}: loss of one layer stored smaller, in 1,000 tokens")
    table.add_column("layer")
    for one in storages[1:]:
        table.add_column(str(one), justify="right")
    for unit, own in enumerate(losses):
        name = "head" if unit == len(losses) - 1 else str(unit + 1)
        table.add_row(name, *(f"{1000 * own[str(one)]:.2f}" for one in storages[1:]))
    if losses:
        console.print(table)
    table = Table(title=f"beside the float model, on {count} other texts; changes in points")
    columns = (
        "variant",
        "MB",
        "KB of cache a token",
        "same choice",
        "nats, change [95 %]",
        "tokens right",
        "texts right",
    )
    for column in (*columns, "ms a token", "speed [95 %]"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in rows.items():
        low, high = row.nll_interval
        speed = "-"
        if row.speed is not None and row.speed_interval is not None:
            speed = f"{row.speed:.2f} [{row.speed_interval[0]:.2f}, {row.speed_interval[1]:.2f}]"
        table.add_row(
            name,
            f"{row.bytes / 1e6:.2f}",
            "-" if row.cache_bytes is None else f"{row.cache_bytes / 1000:.1f}",
            f"{100 * row.agreement:.2f} %",
            f"{row.nll:.4f}, {row.nll_change:+.4f} [{low:+.4f}, {high:+.4f}]",
            _points(row.tokens_right, row.tokens_change, row.tokens_interval),
            _points(row.right / count, (row.gained - row.lost) / count, row.right_interval),
            "-" if row.ms is None else f"{row.ms:.3f}",
            speed,
        )
    console.print(table)
    for name, plan in plans.items():
        if name.startswith("mixed"):
            every = " ".join(map(str, (*plan.layers, plan.head)))
            console.print(f"{name}: {every}", soft_wrap=True)


def _points(share: float, change: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * share:.1f} %, {100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
