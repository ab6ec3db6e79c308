"""Loss on texts that are not trained on, while training goes on, beside the teacher's.

A batch that a run draws may be one it drew before, so its loss shows what was learned by heart too.
What is asked of a student (within so much of its teacher's loss) is asked on other text.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deliberate.config import IGNORE_INDEX
from deliberate.data.prompts import Example
from deliberate.data.texts import Document, load_file
from deliberate.train.objectives.base import Objective
from deliberate.train.objectives.teacher_states import TeacherStates
from deliberate.train.setting_checks import check_whole
from deliberate.utils.devices import use_bf16
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

CSV_NAME = "held_out.csv"
_DRAWS = 2000


@dataclass(frozen=True)
class HeldOutLoss:
    """Losses on the held-out texts after a step, nats a token, every token counting alike.

    Attributes:
        step: optimizer steps done.
        loss, teacher: of the model, and of its teacher (None without one, as all below).
        ratio, low, high: loss / teacher with its 95 % bootstrap interval over texts.
        same: share of tokens of which both choose the same.
        divergence: KL(teacher || model), mean nats a token.
    """

    step: int
    loss: float
    teacher: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    same: float | None = None
    divergence: float | None = None

    def line(self) -> str:
        """As the console shows it."""
        own = f"held out: step {self.step}  loss {self.loss:.4f}"
        if self.teacher is None or self.same is None:
            return own
        return (
            f"{own}  teacher {self.teacher:.4f}  ratio {self.ratio:.3f} "
            f"[{self.low:.3f}, {self.high:.3f}]  divergence {self.divergence:.4f}  "
            f"same choice {100 * self.same:.1f}%"
        )


def summary(
    step: int,
    counts: Sequence[int],
    losses: Sequence[float],
    teacher: Sequence[float] | None,
    same: float = 1.0,
    divergence: float = 0.0,
) -> HeldOutLoss:
    """Of sums of nats by text: `counts` tokens, the model's `losses`, its teacher's."""
    tokens, own = np.asarray(counts, float), np.asarray(losses, float)
    loss = float(own.sum() / tokens.sum())
    if teacher is None:
        return HeldOutLoss(step, loss)
    theirs = np.asarray(teacher, float)
    draws = np.random.default_rng(0).integers(0, len(own), (_DRAWS, len(own)))
    ratios = own[draws].sum(axis=1) / theirs[draws].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return HeldOutLoss(
        step=step,
        loss=loss,
        teacher=float(theirs.sum() / tokens.sum()),
        ratio=float(own.sum() / theirs.sum()),
        low=float(low),
        high=float(high),
        same=same,
        divergence=divergence,
    )


class HeldOutLog(TrainerCallback):
    """Prints the losses before the first step, every so many steps and at the end; writes
    ``held_out.csv``.

    Args:
        folder: of the run.
        objective: whose model is read; a teacher is read if it has one.
        texts: each with a prompt of at least one token and an answer.
        every: steps.
        bf16: the layers' products in bfloat16, as in training.
    """

    def __init__(
        self, folder: Path, objective: Objective, texts: Sequence[Example], every: int, bf16: bool
    ) -> None:
        self.path, self.texts, self.every, self.bf16 = folder / CSV_NAME, texts, every, bf16
        self.objective = objective
        found: tuple[nn.Module, ...] = getattr(objective, "_teacher", ())
        # Read once: its part of every line is the same.
        self.teacher = TeacherStates(found[0], keep=True) if found else None
        self.history: list[HeldOutLoss] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps what was measured before the checkpoint that the run resumes."""
        if self.path.is_file():
            self.history = [one for one in read_csv(self.path) if one.step <= state.global_step]
        self._measure(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures where it is due."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        done = self.history and self.history[-1].step == state.global_step
        if done or not state.is_world_process_zero:
            return
        self.history.append(self.read(state.global_step))
        print(self.history[-1].line(), flush=True)
        names = [field.name for field in fields(HeldOutLoss)]
        rows = [",".join(names)]
        rows += [",".join(_cell(getattr(one, name)) for name in names) for one in self.history]
        write_text(self.path, "\n".join(rows) + "\n")

    @torch.no_grad()
    def read(self, step: int) -> HeldOutLoss:
        """Reads every text once, by the model and its teacher."""
        own = self.objective.model.base
        training = own.training
        own.eval()
        losses: list[float] = []
        teacher: list[float] = []
        same, divergence = 0, 0.0
        for text in self.texts:
            target = torch.tensor(text.answer, device=own.device)
            shares = self._shares(own, text)
            losses.append(-float(shares.gather(1, target[:, None]).sum()))
            if self.teacher is None:
                continue
            known = self._known(self.teacher, text)[:, : shares.shape[1]]
            teacher.append(-float(known.gather(1, target[:, None]).sum()))
            same += int((known.argmax(-1) == shares.argmax(-1)).sum())
            divergence += float((known.exp() * (known - shares)).sum())
        own.train(training)
        counts = [len(text.answer) for text in self.texts]
        tokens = sum(counts)
        return summary(step, counts, losses, teacher or None, same / tokens, divergence / tokens)

    def _shares(self, model: Any, text: Example) -> Tensor:
        """Logarithms of the probabilities ``[answer, V]`` of the answer's positions."""
        ids = torch.tensor([text.prompt + text.answer], device=model.device)
        kind = "cuda" if ids.is_cuda else "cpu"
        with torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
            logits = model(
                input_ids=ids, use_cache=False, logits_to_keep=len(text.answer) + 1
            ).logits
        found: Tensor = logits[0, :-1].float().log_softmax(-1)
        return found

    def _known(self, teacher: TeacherStates, text: Example) -> Tensor:
        """As `_shares`, of the teacher."""
        device = self.objective.model.base.device
        ids = torch.tensor([text.prompt + text.answer], device=device)
        labels = ids.clone()
        labels[:, : len(text.prompt)] = IGNORE_INDEX
        kind = "cuda" if ids.is_cuda else "cpu"
        with torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
            logits = teacher.backbone.head_logits(teacher.read(ids, labels, None))
        return logits.float().log_softmax(-1)


def read_csv(path: Path) -> list[HeldOutLoss]:
    """What an earlier run wrote into ``held_out.csv``."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [field.name for field in fields(HeldOutLoss) if field.name != "step"]
    return [
        HeldOutLoss(int(row["step"]), **{name: float(row[name]) for name in names if row[name]})
        for row in rows
    ]


def _cell(value: float | None) -> str:
    return "" if value is None else str(value)


def held_out_texts(cfg: DictConfig) -> list[Example]:
    """The texts of ``trainer.held_out``: a file of token ids (`tokens`) and prompt lengths
    (`prompt`), cut at ``data.max_tokens``; empty where there is none.

    Raises:
        DeliberateError: a file that does not exist, or holds no text with an answer.
    """
    if cfg.trainer.held_out is None:
        return []
    columns = {"path": str(cfg.trainer.held_out), "tokens": "tokens", "prompt": "prompt"}
    try:
        documents = load_file("held_out", columns)
    except DeliberateError as error:
        raise DeliberateError(
            str(error).replace("data.files.held_out.path", "trainer.held_out")
        ) from None
    found = []
    for one in documents:
        if isinstance(one, Document) and one.tokens is not None:
            begin = max(1, one.prompt)
            answer = list(one.tokens[begin : cfg.data.max_tokens])
            if answer:
                found.append(Example(list(one.tokens[:begin]), answer))
    if not found:
        raise DeliberateError(
            f"trainer.held_out={cfg.trainer.held_out} has no text with an answer within "
            f"data.max_tokens={cfg.data.max_tokens}: raise it, or give another file"
        )
    return found


def check_held_out(cfg: DictConfig) -> None:
    """The file can be read, and the model is whole in one process."""
    check_whole(cfg, "trainer.held_out_every", least=1)
    if cfg.trainer.held_out is not None and cfg.trainer.fsdp:
        raise DeliberateError(
            "trainer.held_out with trainer.fsdp=true: no process has the whole model to read with; "
            "leave one out"
        )
    held_out_texts(cfg)


def held_out_log(cfg: DictConfig, folder: Path, objective: Objective) -> list[HeldOutLog]:
    """The configured log, or none."""
    texts = held_out_texts(cfg)
    if not texts:
        return []
    return [
        HeldOutLog(folder, objective, texts, cfg.trainer.held_out_every, use_bf16(cfg.trainer.bf16))
    ]
