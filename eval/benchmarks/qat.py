"""`deliberate bench qat`: what rounding costs a model, and how much training under it recovers.

The float model, the same rounded to nearest, one that was trained under the rounding (recipe=qat)
and a control that was trained as long without it are read on the same texts, by transformers'
modules with their layers' weights rounded in place: nats a token, texts whose every token is chosen
right, the divergence from the float model's distribution, and what the exits do under the
thresholds that each model has. Texts are paired; the share recovered is (rounded - trained) /
(rounded - float), with a bootstrap interval over texts. Of texts that could go on in several ways
the divergence says more: their likelihood has a part that no model can know.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.table import Table
from scipy.stats import wilcoxon
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Example
from deliberate.data.texts import Document, load_file
from deliberate.eval.benchmarks.harness import UNBOUNDED, Session, table_console
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.executors.rounded_layers import round_layers, rounding_named
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError

_DRAWS = 4000


@dataclass(frozen=True)
class Figures:
    """What one model makes of the texts.

    Attributes:
        nll: mean negative log-likelihood of the solution's tokens, nats, a text.
        right: each of them is the solution's, a text.
        divergence: KL(float || it), mean nats a token, a text; 0 of the float model.
        same: share of tokens of which the float model chooses the same.
        exited: share of tokens that exit early under the model's own thresholds.
        accepted: share of those that the model's last layer chooses, too; nan where none exits.
    """

    nll: list[float]
    right: list[bool]
    divergence: list[float]
    same: float
    exited: float
    accepted: float


@dataclass(frozen=True)
class Recovery:
    """How much of a loss was recovered.

    Attributes:
        lost, left: nats a token of the rounded model, and of the trained one, beyond the float
            model's.
        lost_interval: 95 % interval of `lost` over texts; where it has zero in it, the share says
            nothing.
        share, interval: 1 - left / lost, with its 95 % interval over texts.
        p: Wilcoxon's signed rank test, paired, that the trained model's nats differ from those of
            the rounded one.
    """

    lost: float
    lost_interval: tuple[float, float]
    left: float
    share: float
    interval: tuple[float, float]
    p: float


class Reference:
    """The float model's distribution at each token of each text: normed states and the head.

    Args:
        model: the float model, before any rounding.
        texts: as for `figures`.
    """

    @torch.inference_mode()
    def __init__(self, model: AdaptiveModel, texts: Sequence[Example]) -> None:
        self._head = model.backbone.head_logits
        self._states = [_top(model, text)[1] for text in texts]

    @torch.inference_mode()
    def logits(self, index: int) -> Tensor:
        """Of the text of this number, ``[answer, V]``."""
        return self._head(self._states[index]).float()


def _top(model: AdaptiveModel, text: Example) -> tuple[Any, Tensor]:
    """States of a text, and those behind the last layer that predict its answer, normed."""
    states = model(torch.tensor([text.prompt + text.answer]), output_exit_states=True)
    return states, model.backbone.norm(states.last[0, len(text.prompt) - 1 : -1])


@torch.inference_mode()
def figures(
    model: AdaptiveModel, texts: Sequence[Example], reference: Reference | None = None
) -> Figures:
    """Reads each solution behind its question, teacher-forced, in one pass a text.

    Args:
        reference: of the float model; None where this is it.
    """
    backbone, exits, measure = model.backbone, model.exits, model.exits.measure
    thresholds = model.exit_config.thresholds
    nll, right, divergence, same, exited, accepted, tokens = [], [], [], 0, 0, 0, 0
    for number, text in enumerate(texts):
        states, last = _top(model, text)
        rows = slice(len(text.prompt) - 1, -1)
        target = torch.tensor(text.answer)
        logits = backbone.head_logits(last).float()
        shares = logits.log_softmax(-1)
        nll.append(-float(shares.gather(1, target[:, None]).mean()))
        top = logits.argmax(-1)
        if reference is None:
            divergence.append(0.0)
            same += len(target)
        else:
            wanted = reference.logits(number)
            known = wanted.log_softmax(-1)
            divergence.append(float((known.exp() * (known - shares)).sum(-1).mean()))
            same += int((wanted.argmax(-1) == top).sum())
        right.append(bool((top == target).all()))
        waiting = torch.ones(len(target), dtype=torch.bool)
        for index, hidden in enumerate(states.exits):
            if thresholds[index] == math.inf:
                continue  # no token exits there, and a head costs as much as several layers
            normed = backbone.norm(hidden[0, rows])
            own = backbone.head_logits(exits.translate(index, normed))
            token, confidence = measure.score(own.float())
            if measure.before_head:
                confidence = torch.sigmoid(exits.gate_logit(index, normed)).float()
            taken = waiting & (confidence >= thresholds[index])
            exited += int(taken.sum())
            accepted += int((taken & (token == top)).sum())
            waiting &= ~taken
        tokens += len(target)
    return Figures(
        nll,
        right,
        divergence,
        same / tokens,
        exited / tokens,
        accepted / exited if exited else float("nan"),
    )


def recovery(
    plain: Sequence[float], rounded: Sequence[float], trained: Sequence[float]
) -> Recovery:
    """How much of what rounding lost was recovered, of nats by text of the three models."""
    base, low, high = map(np.asarray, (plain, rounded, trained))
    lost, left = low - base, high - base
    draws = np.random.default_rng(0).integers(0, len(base), (_DRAWS, len(base)))
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing was lost
        shares = 1 - left[draws].mean(axis=1) / lost[draws].mean(axis=1)
    same = bool(np.all(low == high))
    return Recovery(
        lost=float(lost.mean()),
        lost_interval=_middle(lost[draws].mean(axis=1)),
        left=float(left.mean()),
        share=float(1 - left.mean() / lost.mean()) if lost.mean() else float("nan"),
        interval=_middle(shares),
        p=1.0 if same else float(wilcoxon(high, low).pvalue),
    )


def _middle(drawn: NDArray[np.float64]) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench qat`` with overrides of `configs/bench_qat.yaml`.

    Raises:
        DeliberateError: settings that cannot work.
    """
    cfg = bench_config("bench_qat", arguments, verbatim=(*VERBATIM, "trained", "control", "texts"))
    all_at_least(cfg, {"limit": 4, "threads": 1})
    storage = rounding_named(str(cfg.weights))
    if cfg.trained is None:
        raise DeliberateError("trained=null: give the model that recipe=qat made, trained=FOLDER")
    session = Session("qat", arguments, cfg.threads)
    task = command_task(cfg) if cfg.texts is None else None
    texts = _own_texts(cfg) if task is None else _solutions(cfg, task)
    if len(texts) < 4:
        raise DeliberateError(f"{len(texts)} texts: take more problems (limit=...)")
    found: dict[str, Figures] = {}
    reference = None
    names = {"float": cfg.model, "rounded": cfg.model, "trained": cfg.trained}
    if cfg.control is not None:
        names["control"] = cfg.control
    for name, source in names.items():
        model = AdaptiveModel.from_pretrained(str(source), executor="generic").eval()
        if name != "float":
            round_layers(model.backbone, storage)
        found[name] = figures(model, texts, reference)
        if reference is None:
            reference = Reference(model, texts)
    taken: dict[str, Recovery] = {}
    apart: dict[str, Recovery] = {}
    for name in ("trained", "control"):
        if name in found:
            three = [found[one] for one in ("float", "rounded", name)]
            taken[name] = recovery(*(one.nll for one in three))
            apart[name] = recovery(*(one.divergence for one in three))
    session.end()
    _show(cfg, found, taken, apart)
    table_console().print(session.line())
    session.write(
        cfg.out,
        {
            "model": str(cfg.model),
            "weights": str(cfg.weights),
            "texts": len(texts),
            "figures": {
                name: asdict(one) | {"accepted": one.accepted if one.exited else None}
                for name, one in found.items()
            },
            "recovery": {name: asdict(one) for name, one in taken.items()},
            "divergence": {name: asdict(one) for name, one in apart.items()},
        },
    )


def _solutions(cfg: DictConfig, task: Task) -> list[Example]:
    """The task's problems with their solutions."""
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
    made = [encoder.example(problem) for problem in task.problems]
    return [one for one in made if one is not None]


def _own_texts(cfg: DictConfig) -> list[Example]:
    """Prompts and answers of a file, of which there is a token before the first answered one."""
    columns = {"path": str(cfg.texts), "tokens": "tokens", "prompt": "prompt"}
    found = []
    for one in load_file("texts", columns, limit=cfg.limit):
        if isinstance(one, Document) and one.tokens is not None:
            begin = max(1, one.prompt)
            found.append(Example(list(one.tokens[:begin]), list(one.tokens[begin:])))
    return [one for one in found if one.answer]


def _show(
    cfg: DictConfig,
    found: dict[str, Figures],
    taken: dict[str, Recovery],
    apart: dict[str, Recovery],
) -> None:
    table = Table(title=f"{cfg.model}, layers rounded to {cfg.weights}")
    columns = ("model", "nats a token", "from float", "same choice", "texts right")
    for column in (*columns, "tokens that exit", "of them accepted"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, one in found.items():
        table.add_row(
            name,
            f"{statistics.fmean(one.nll):.5f}",
            f"{statistics.fmean(one.divergence):.5f}",
            f"{100 * one.same:.2f} %",
            f"{sum(one.right)} of {len(one.right)}",
            f"{100 * one.exited:.1f} %",
            f"{100 * one.accepted:.2f} %" if one.exited else "-",
        )
    console = table_console(110)
    console.print(table)
    for name in taken:
        console.print(f"{name}, likelihood: {_recovered(taken[name])}", soft_wrap=True)
        console.print(f"{name}, divergence: {_recovered(apart[name])}", soft_wrap=True)


def _recovered(own: Recovery) -> str:
    least, most = own.lost_interval
    if least <= 0:
        return (
            f"rounding costs {own.lost:+.4f} nats [{least:+.4f}, {most:+.4f}], nothing to recover; "
            f"it is {own.left:+.4f} from float"
        )
    low, high = own.interval
    share = f"{100 * own.share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{share} of {own.lost:.4f} nats recovered (p = {own.p:.2g})"
