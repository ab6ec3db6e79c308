"""`deliberate bench subset`: would drafts by a subset of the layers, found by search, pay?

SWIFT (arXiv:2410.06916) drafts with some of the model's own layers, chosen by search and without
training. Here layers are dropped one at a time, always the one whose absence changes fewest choices
on recorded text. On other text each subset's choices are compared with the whole model's, and the
measured times of layers, head and passes say what such drafts would gain at best: every draft is
taken to be accepted as often as the first, which is more than can be had.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.harness import (
    UNBOUNDED,
    Session,
    check_clock,
    interleaved,
    load_model,
    table_console,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.modeling.backbone import Backbone
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError

_STEPS = 10


@dataclass(frozen=True)
class Subset:
    """A subset of the layers as a source of drafts.

    Attributes:
        layers: those that run, numbered from 1.
        agreement: share of tokens for which it chooses what the whole model does; of texts that the
            search has not seen.
        cost: time of one draft, as a share of a pass of the whole model.
        drafts: of a pass, where most is gained.
        speed: tokens a second at best, as a multiple of decoding without drafts.
    """

    layers: tuple[int, ...]
    agreement: float
    cost: float
    drafts: int
    speed: float


@dataclass(frozen=True)
class Times:
    """Seconds: of all layers and of the head for one token, and of one more token in a pass."""

    layers: float
    head: float
    more: float


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench subset`` with overrides of `configs/bench_subset.yaml`.

    Raises:
        DeliberateError: settings that cannot work.
    """
    cfg = bench_config("bench_subset", arguments, verbatim=VERBATIM)
    all_at_least(cfg, {"limit": 4, "most": 1, "rounds": 4, "context": 1, "threads": 1})
    check_clock(cfg)
    session = Session("subset", arguments, cfg.threads)
    task = command_task(cfg)
    model = load_model(cfg)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
    made = [encoder.example(problem) for problem in task.problems]
    texts = [one for one in made if one is not None]
    half = len(texts) // 2
    if half < 2:
        raise DeliberateError(f"{len(texts)} texts: take more problems (limit=...)")
    backbone = model.backbone
    given = None if cfg.subsets is None else checked(cfg.subsets, backbone.num_layers)
    measured = times(backbone, cfg)
    found = [
        judged(backbone, layers, texts[half:], measured, cfg.most)
        for layers in (search(backbone, texts[:half]) if given is None else given)
    ]
    session.end()
    table = Table(title=f"{cfg.model}: drafts by a subset of {backbone.num_layers} layers, at best")
    for column in ("layers", "agreement", "time of a draft", "drafts a pass", "speed"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for one in found:
        table.add_row(
            " ".join(map(str, one.layers)),
            f"{100 * one.agreement:.1f} %",
            f"{one.cost:.2f}",
            str(one.drafts),
            f"{one.speed:.2f}",
        )
    console = table_console(110)
    console.print(table)
    console.print(session.line(str(cfg.clock)))
    session.write(
        cfg.out,
        {
            "model": str(cfg.model),
            "times": asdict(measured),
            "subsets": [asdict(one) for one in found],
        },
    )


def checked(subsets: Any, num_layers: int) -> list[tuple[int, ...]]:
    """Given subsets of the layers, numbered from 1.

    Raises:
        DeliberateError: one that is no rising list of layers that there are.
    """
    found = [tuple(one) if isinstance(one, Sequence) else one for one in subsets]
    for one in found:
        whole = isinstance(one, tuple) and all(type(layer) is int for layer in one)
        if (
            not whole
            or not one
            or list(one) != sorted({*one})
            or one[0] < 1
            or one[-1] > num_layers
        ):
            shown = list(one) if isinstance(one, tuple) else one
            raise DeliberateError(
                f"subsets: {shown} must be layers from 1 to {num_layers}, rising, each once; give "
                "lists of them, e.g. [[1,2,4]]"
            )
    if not found:
        raise DeliberateError("subsets=[]: give lists of layers, or null to search")
    return found


def search(backbone: Backbone, texts: Sequence[Example]) -> list[tuple[int, ...]]:
    """Subsets of the layers, numbered from 1, each one smaller than the one before.

    From each the layer is dropped whose absence leaves most of the whole model's choices; of equals
    the deepest.
    """
    kept = tuple(range(1, backbone.num_layers + 1))
    wanted = choices(backbone, kept, texts)
    path = []
    while len(kept) > 1:
        smaller = [tuple(one for one in kept if one != dropped) for dropped in reversed(kept)]
        kept = max(smaller, key=lambda one: same(choices(backbone, one, texts), wanted))
        path.append(kept)
    return path


def judged(
    backbone: Backbone, layers: tuple[int, ...], texts: Sequence[Example], cost: Times, most: int
) -> Subset:
    """What a subset is worth as a source of at most so many drafts a pass."""
    every = tuple(range(1, backbone.num_layers + 1))
    agreement = same(choices(backbone, layers, texts), choices(backbone, every, texts))
    whole = cost.layers + cost.head
    own = (cost.layers * len(layers) / backbone.num_layers + cost.head) / whole
    drafts, speed = best(agreement, own, cost.more / whole, most)
    return Subset(layers, agreement, own, drafts, speed)


def best(agreement: float, cost: float, slope: float, most: int) -> tuple[int, float]:
    """Drafts a pass (1 or more) with the most tokens a second, and that as a multiple of none.

    Args:
        agreement: chance that a draft is accepted where those before it were.
        cost, slope: of a draft, and of one more token in a pass, as shares of a pass.
    """
    speeds = {
        count: sum(agreement**one for one in range(count + 1)) / (1 + count * (cost + slope))
        for count in range(1, most + 1)
    }
    count = max(speeds, key=speeds.__getitem__)
    return count, speeds[count]


@torch.inference_mode()
def choices(backbone: Backbone, layers: Sequence[int], texts: Sequence[Example]) -> list[Tensor]:
    """The most likely token at each of a solution's tokens, with these layers alone."""
    found = []
    for text in texts:
        ids = torch.tensor([text.prompt + text.answer], device=backbone.device)
        cache = backbone.new_cache(ids.shape[1])
        ctx = backbone.context(0, ids.shape[1], device=backbone.device)
        hidden = backbone.embed(ids, ctx)
        for layer in layers:
            hidden = backbone.run_layers(hidden, layer - 1, layer, ctx, cache)
        states = hidden[0, len(text.prompt) - 1 : -1]
        found.append(backbone.read_full_depth(states).logits.argmax(-1))
    return found


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Share of tokens of all texts that are the same."""
    return float(torch.cat(list(found)).eq(torch.cat(list(wanted))).double().mean())


def times(backbone: Backbone, cfg: DictConfig) -> Times:
    """Measured on this machine, in turn."""
    clock = check_clock(cfg)
    count = int(cfg.context)
    runs: dict[str, Callable[[], Any]] = {
        "one": _passes(backbone, count, 1),
        "three": _passes(backbone, count, 3),
        "head": _heads(backbone),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn, _, name in interleaved(range(cfg.rounds + 2), list(runs), warmup=2, title="times"):
        seconds = timed(runs[name], clock)[1]
        if turn.counted:
            taken[name].append(seconds / _STEPS)
    one, three, head = (statistics.median(taken[name]) for name in runs)
    return Times(layers=one, head=head, more=max(0.0, (three - one) / 2))


@torch.inference_mode()
def _passes(backbone: Backbone, context: int, tokens: int) -> Callable[[], None]:
    """All layers over so many tokens behind a context."""
    cache = backbone.new_cache(context + tokens + 8)
    ids = torch.randint(0, backbone.vocab_size, (1, context), device=backbone.device)
    ctx = backbone.context(0, context, device=backbone.device)
    depth = backbone.num_layers
    backbone.run_layers(backbone.embed(ids, ctx), 0, depth, ctx, cache)
    few = torch.randint(0, backbone.vocab_size, (1, tokens), device=backbone.device)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(_STEPS):
            cache.crop(context)
            own = backbone.context(context, tokens, device=backbone.device)
            backbone.run_layers(backbone.embed(few, own), 0, depth, own, cache)

    return run


@torch.inference_mode()
def _heads(backbone: Backbone) -> Callable[[], None]:
    states = torch.randn((1, backbone.hidden_size), device=backbone.device, dtype=backbone.dtype)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(_STEPS):
            int(backbone.read_full_depth(states).logits.argmax())

    return run
