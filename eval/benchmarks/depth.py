"""`deliberate bench depth`: how many of its layers does a model need?

For each number of layers the best ones by search (`deliberate.modeling.layer_choice`), fitted in
closed form (`deliberate.modeling.layer_fit`), without training: the loss on held-out texts against
the whole model's, and the time of a token. A student is chosen from it, to be used as it is or
trained further (`deliberate train +experiment=smollm2_distill 'model.keep_layers=[...]'`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.data.prompts import Example
from deliberate.data.texts import Document, load_file
from deliberate.eval.benchmarks.harness import Session, check_clock, load_model, table_console
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.benchmarks.subset import times
from deliberate.eval.statistics import ratio_of_sums
from deliberate.modeling.layer_choice import best_layers, segment_costs
from deliberate.modeling.layer_fit import fit_layers
from deliberate.modeling.pruning import check_kept, keep_layers
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Depth:
    """A student of so many layers.

    Attributes:
        layers: kept, numbered from 1.
        expected: divergence that the search adds up, nats a token; None where layers were given.
        loss: of the fitted student on the held-out texts, nats a token, all tokens alike.
        ratio, interval: to the whole model's, with a 95 % bootstrap interval over texts.
        divergence: KL(whole || student), mean nats a token.
        same: share of tokens of which both choose the same.
        time: of a token, as a share of the whole model's, by the times of layers and head.
        seconds: processor time of the fit.
    """

    layers: list[int]
    expected: float | None
    loss: float
    ratio: float
    interval: tuple[float, float]
    divergence: float
    same: float
    time: float
    seconds: float


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench depth`` with overrides of `configs/bench_depth.yaml`.

    Raises:
        DeliberateError: settings that cannot work.
    """
    cfg = bench_config("bench_depth", arguments, verbatim=("model", "out", "texts", "held_out"))
    all_at_least(
        cfg,
        {"most": 2, "search_tokens": 1, "judged": 1, "fit_tokens": 1, "limit": 4, "rounds": 4,
         "context": 1, "threads": 1, "max_tokens": 2},
    )  # fmt: skip
    check_clock(cfg)
    source = checkpoint.resolve(str(cfg.model))
    for name in ("texts", "held_out"):
        if cfg[name] is None:
            raise DeliberateError(
                f"{name}=null: give a file of token ids ({name}=FILE), as `deliberate fit` writes "
                "a model's own answers"
            )
    session = Session("depth", arguments, cfg.threads)
    saved = checkpoint.read_adaptive_config(source)
    model: Any = checkpoint.load_base(source if saved is None else saved.base).float().eval()
    depth = int(model.config.num_hidden_layers)
    wanted = _checked(cfg, depth)
    texts, judged = _texts(cfg, "texts"), _texts(cfg, "held_out")[: cfg.limit]
    if len(judged) < 4:
        raise DeliberateError(f"held_out={cfg.held_out} has {len(judged)} texts: give 4 or more")
    cost = times(load_model(cfg).backbone, cfg)
    whole = [shares(model, one) for one in judged]
    choices: list[tuple[list[int], float | None]]
    if cfg.layers is not None:
        choices = [(list(one), None) for one in wanted]
    else:
        search = _rows(texts[cfg.judged :], cfg.search_tokens)
        costs = segment_costs(
            model,
            search,
            [(one.prompt, one.answer) for one in texts[: cfg.judged]],
            most=cfg.most,
            tell=lambda line: print(line, flush=True),
        )
        choices = [best_layers(costs, depth, one) for one in wanted]
    fitted_on = _rows(texts[cfg.judged :], cfg.fit_tokens)
    found = []
    for layers, expected in choices:
        began = time.process_time()
        student: Any = keep_layers(model, layers).eval()
        fit_layers(student, model, layers, fitted_on)
        seconds = time.process_time() - began
        share = (cost.layers * len(layers) / depth + cost.head) / (cost.layers + cost.head)
        found.append(
            Depth(
                layers,
                expected,
                **read(student, judged, whole),
                time=share,
                seconds=seconds,
            )
        )
        own = found[-1]
        print(f"{len(layers)} layers kept: {own.loss:.4f} nats a token, {own.ratio:.2f} of the "
              f"whole model's", flush=True)  # fmt: skip
    session.end()
    _show(cfg, found, sum(map(len, fitted_on)), depth)
    table_console().print(session.line(str(cfg.clock)))
    session.write(
        cfg.out,
        {
            "model": str(cfg.model),
            "times": asdict(cost),
            "fit_tokens": sum(map(len, fitted_on)),
            "students": [asdict(one) for one in found],
        },
    )


def _checked(cfg: DictConfig, depth: int) -> list[Any]:
    """Numbers of layers, or lists of layers, to make students of."""
    if cfg.layers is not None:
        given: Any = OmegaConf.to_container(cfg.layers)
        if not isinstance(given, list) or not given:
            raise DeliberateError(f"layers={given!r} must be lists of layers, e.g. [[1,2,4]]")
        for one in given:
            check_kept(one, depth, str(cfg.model))
        return given
    counts: Any = cfg.keep
    counts = list(range(depth, 2 * depth // 3 - 1, -3)) if counts is None else list(counts)
    for one in counts:
        if type(one) is not int or not 1 <= one <= depth:
            raise DeliberateError(f"keep={counts}: {cfg.model} has 1 to {depth} layers to keep")
        if one * cfg.most < depth:
            raise DeliberateError(
                f"keep={counts}: {one} layers that stand for at most {cfg.most} each do not make "
                f"{depth}; raise most"
            )
    return counts


def _texts(cfg: DictConfig, key: str) -> list[Example]:
    columns = {"path": str(cfg[key]), "tokens": "tokens", "prompt": "prompt"}
    found = []
    for one in load_file(key, columns):
        if isinstance(one, Document) and one.tokens is not None:
            begin = max(1, one.prompt)
            found.append(
                Example(list(one.tokens[:begin]), list(one.tokens[begin : cfg.max_tokens]))
            )
    return [one for one in found if one.answer]


def _rows(texts: Sequence[Example], tokens: int) -> list[list[int]]:
    """Token ids of texts drawn evenly from all of them, of so many tokens together."""
    lengths = [len(one.prompt) + len(one.answer) for one in texts]
    if sum(lengths) < tokens:
        raise DeliberateError(
            f"texts hold {sum(lengths)} tokens, not {tokens}: lower search_tokens and fit_tokens"
        )
    stride = max(1, int(sum(lengths) / tokens))
    rows: list[list[int]] = []
    found = 0
    for one in texts[::stride]:
        rows.append(one.prompt + one.answer)
        found += len(rows[-1])
        if found >= tokens:
            break
    return rows


@torch.inference_mode()
def shares(model: Any, text: Example) -> tuple[float, Tensor, Tensor]:
    """A text's nats, and the states and choices that other models are compared with."""
    ids = torch.tensor([text.prompt + text.answer])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(text.answer) + 1).logits
    known = logits[0, :-1].float().log_softmax(-1)
    target = torch.tensor(text.answer)
    return -float(known.gather(1, target[:, None]).sum()), known.half(), known.argmax(-1)


def read(
    model: Any, texts: Sequence[Example], whole: Sequence[tuple[float, Tensor, Tensor]]
) -> dict[str, Any]:
    """The model's losses against those of the whole model, which `shares` gave."""
    losses, same, divergence = [], 0, 0.0
    for text, (_, known, choice) in zip(texts, whole, strict=True):
        nats, own, token = shares(model, text)
        losses.append(nats)
        same += int((token == choice).sum())
        wide, other = known.float(), own.float()
        divergence += float((wide.exp() * (wide - other)).sum())
    tokens = sum(len(one.answer) for one in texts)
    ratio = ratio_of_sums(losses, [one[0] for one in whole])
    assert ratio.interval is not None  # there are four texts or more
    return {
        "loss": sum(losses) / tokens,
        "ratio": ratio.value,
        "interval": (ratio.interval.low, ratio.interval.high),
        "divergence": divergence / tokens,
        "same": same / tokens,
    }


def _show(cfg: DictConfig, found: Sequence[Depth], tokens: int, depth: int) -> None:
    table = Table(title=f"{cfg.model}: some of its {depth} layers, fitted on {tokens:,} tokens")
    columns = ("kept", "nats a token", "of the whole model's", "divergence", "same choice", "time")
    for column in columns:
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(
            str(len(one.layers)),
            f"{one.loss:.4f}",
            f"{one.ratio:.2f} [{one.interval[0]:.2f}, {one.interval[1]:.2f}]",
            f"{one.divergence:.4f}",
            f"{100 * one.same:.1f} %",
            f"{one.time:.2f}",
        )
    console = table_console(110)
    console.print(table)
    for one in found:
        kept = ",".join(map(str, one.layers))
        console.print(f"{len(one.layers)}: 'model.keep_layers=[{kept}]'", soft_wrap=True)
