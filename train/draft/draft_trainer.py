"""Training of a draft layer from cached hidden states, several drafts deep on its own outputs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.engine.layer_drafts import CONTEXT
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.train.draft.hidden_cache import HiddenCache, Text
from deliberate.train.draft.soft_loss import soft_cross_entropy
from deliberate.train.draft.unrolled import unrolled
from deliberate.train.optim import OPTIMIZERS, build_optimizer
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file


@dataclass(frozen=True)
class DraftTraining:
    """How a draft layer is trained.

    Attributes:
        passes: over the texts.
        depth: drafts of a chain that are trained.
        texts_per_step: of one step of the optimizer.
        learning_rate: at its largest; warmed up, then lowered to a tenth along a cosine.
        warmup: share of the steps.
        optimizer: ``adamw``, or ``muon`` for matrices.
        weight_decay: on matrices.
        decay: weight of a draft relative to the one before it.
        state_weight: of the squared error of the normed state, relative to its size, beside the
            cross-entropy to the model's distribution (EAGLE-1's two losses).
        seed: of the order of the texts.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    passes: float = 6.0
    depth: int = 4
    texts_per_step: int = 4
    learning_rate: float = 1e-3
    warmup: float = 0.03
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    decay: float = 0.8
    state_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "texts_per_step"):
            if getattr(self, name) < 1:
                raise DeliberateError(f"draft.{name}={getattr(self, name)} must be at least 1")
        if self.optimizer not in OPTIMIZERS:
            raise DeliberateError(
                f"draft.optimizer={self.optimizer} must be one of {', '.join(OPTIMIZERS)}"
            )
        if not (self.passes > 0 and self.learning_rate > 0 and 0 < self.decay <= 1):
            raise DeliberateError(
                f"draft.passes={self.passes}, draft.learning_rate={self.learning_rate} and "
                f"draft.decay={self.decay}: all must be positive, and the decay at most 1"
            )


@dataclass(frozen=True)
class TextStates:
    """What a draft layer reads of one text of n tokens: entries 0..n-2.

    Attributes:
        embedded: ``[n - 1, d]``, embeddings of tokens 1.. .
        normed: ``[n, d]``, normed states of all positions.
        first: entry of the first draft.
    """

    embedded: Tensor
    normed: Tensor
    first: int


class TextReader(Protocol):
    """Reads texts as a draft layer does.

    Attributes:
        norm: the model's final norm.
    """

    norm: Callable[[Tensor], Tensor]

    def read(self, text: Text) -> TextStates:
        """Embeddings and normed states of a text, float32."""


class DraftData:
    """Texts of a cache as a draft layer reads them.

    Args:
        cache: holds the states after the last layer.
        embedding: ids -> ``[n, d]``.
        norm: the model's final norm.
        prompt_entries: of a prompt, so many of the newest entries are read, as in decoding; None
            for all.
    """

    def __init__(
        self,
        cache: HiddenCache,
        embedding: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor],
        *,
        prompt_entries: int | None = CONTEXT,
    ) -> None:
        self._prompt_entries = prompt_entries
        self._states = cache.states(cache.layers[-1])
        self._tokens = cache.tokens()
        self._embedding = embedding
        self.norm = norm

    def read(self, text: Text) -> TextStates:
        """Embeddings and normed states of a text, float32."""
        first, left = max(0, text.prompt - 1), 0
        if self._prompt_entries is not None:
            left = max(0, first - self._prompt_entries)
        rows = slice(text.start + left, text.start + text.length)
        with torch.no_grad():
            normed = self.norm(self._states[rows].float())
            embedded = self._embedding(self._tokens[rows][1:]).float()
        return TextStates(embedded, normed, first - left)


class DraftTrainer:
    """Trains a draft layer; what was done can be saved and continued.

    Args:
        layer: trained in place.
        head: rows of the model's head for the draft vocabulary, ``[vocabulary, d]``.
        data: reads texts.
        texts: to train on.
        how: settings.
        dtype: of the products, float32 or bfloat16; None measures which is faster here.
    """

    def __init__(
        self,
        layer: DraftLayer,
        head: Tensor,
        data: DraftData,
        texts: Sequence[Text],
        how: DraftTraining,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.layer, self.how = layer, how
        self._data, self._texts = data, list(texts)
        self._optimizer = build_optimizer(
            layer, how.optimizer, lr=how.learning_rate, weight_decay=how.weight_decay
        )
        each = math.ceil(len(self._texts) / how.texts_per_step)
        self.steps = max(1, round(how.passes * each))
        self._each = each
        self.dtype = dtype or faster_dtype()
        self._head = head.to(self.dtype)
        self.step = 0
        self.seconds = 0.0

    def run(
        self, *, note: Callable[[int, float], None] = lambda step, loss: None, save: Path | None,
        save_every: float = 60.0,
    ) -> None:  # fmt: skip
        """Trains to the end.

        Args:
            note: called with the number of steps done and the loss, after each.
            save: file that the state is written to every `save_every` seconds, and at the end.
        """
        self.layer.train()
        saved = time.monotonic()
        while self.step < self.steps:
            began = time.monotonic()
            loss = self._one_step()
            self.step += 1
            self.seconds += time.monotonic() - began
            note(self.step, loss)
            if save is not None and (
                time.monotonic() - saved > save_every or self.step == self.steps
            ):
                self.save(save)
                saved = time.monotonic()
        self.layer.eval()

    def _one_step(self) -> float:
        how = self.how
        turn, place = divmod(self.step, self._each)
        order = list(range(len(self._texts)))
        random.Random(f"{how.seed}:{turn}").shuffle(order)
        chosen = order[place * how.texts_per_step : (place + 1) * how.texts_per_step]
        for group in self._optimizer.param_groups:
            group["lr"] = how.learning_rate * schedule(self.step / self.steps, how.warmup)
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index in chosen:
            loss = self.loss(self._data.read(self._texts[index])) / len(chosen)
            if loss.requires_grad:
                loss.backward()
                total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.layer.parameters(), 1.0)
        self._optimizer.step()
        return total

    def loss(self, text: TextStates) -> Tensor:
        """Weighted mean over the drafts of a chain, of one text; 0 where it has no draft."""
        lower = self.dtype is torch.bfloat16
        with torch.autocast(self._head.device.type, torch.bfloat16, enabled=lower):
            return self._loss(text)

    def _loss(self, text: TextStates) -> Tensor:
        how = self.how
        outputs = unrolled(
            self.layer, text.embedded, text.normed[:-1], self._data.norm,
            depth=min(how.depth, len(text.embedded) - text.first), first=text.first,
        )  # fmt: skip
        wanted = text.normed[text.first + 1 :]
        with torch.no_grad():
            teacher = F.linear(wanted, self._head).float().softmax(dim=-1)
            size = wanted.square().mean()
        total, weights = wanted.new_zeros(()), 0.0
        for step, output in enumerate(outputs):
            normed = self._data.norm(output)
            loss = soft_cross_entropy(F.linear(normed, self._head).float(), teacher[step:])
            error = (normed - wanted[step:]).square().mean() / size
            weight = how.decay**step
            total = total + weight * (loss + how.state_weight * error)
            weights += weight
        return total / weights if weights else total

    def save(self, path: Path) -> None:
        """Writes layer, optimizer and progress, atomically."""
        with atomic_file(path) as partial:
            torch.save(
                {
                    "layer": self.layer.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "step": self.step,
                    "steps": self.steps,
                    "seconds": self.seconds,
                },
                partial,
            )

    def resume(self, path: Path) -> bool:
        """Goes on from what `save` wrote with the same settings and texts; whether it did."""
        if not path.is_file():
            return False
        held: dict[str, Any] = torch.load(path, weights_only=True)
        shapes = {name: one.shape for name, one in self.layer.state_dict().items()}
        same = shapes == {name: one.shape for name, one in held["layer"].items()}
        if held["steps"] != self.steps or not same:
            return False
        self.layer.load_state_dict(held["layer"])
        self._optimizer.load_state_dict(held["optimizer"])
        self.step, self.seconds = held["step"], held["seconds"]
        return True


def faster_dtype(device: str = "cpu") -> torch.dtype:
    """Float32 or bfloat16, whichever multiplies matrices faster here; measured in milliseconds."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 512, dtype=dtype, device=device)
        tries = []
        for _ in range(4):
            began = time.perf_counter()
            float((x @ x.T)[0, 0])
            tries.append(time.perf_counter() - began)
        seconds[dtype] = min(tries)
    return min(seconds, key=lambda dtype: seconds[dtype])


def schedule(done: float, warmup: float) -> float:
    """Share of the learning rate after this share of the steps."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    rest = (done - warmup) / max(1e-9, 1.0 - warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * rest))
