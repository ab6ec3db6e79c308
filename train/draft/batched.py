"""Training of a draft layer on a GPU: texts and states lie on it, and a step takes many of them.

The losses are those of `deliberate.train.draft.draft_trainer`; the mean of a step is over its
drafts, not over its texts, and the schedule follows the clock, for a machine that is at hand
for minutes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.train.draft.draft_trainer import DraftTraining, TextStates, schedule
from deliberate.train.draft.hidden_cache import Text
from deliberate.train.draft.unrolled import unrolled_batch

# Steps between two looks at the loss: each look waits for the device.
_LOOK = 20


class DeviceTexts:
    """Texts with their normed states on the model's device, bfloat16.

    Args:
        base: the wrapped transformers model, whose output ends with its final norm.
        backbone: embedding and norm.
        rows: token ids and the length of the prompt of each text, of at least 3 tokens.
        batch: texts of a pass.

    Attributes:
        texts: where each one lies.
        tokens: int64 ``[N]``.
        norm: the final norm.
    """

    def __init__(
        self,
        base: Any,
        backbone: Backbone,
        rows: Sequence[tuple[Sequence[int], int]],
        *,
        batch: int = 64,
    ) -> None:
        self.norm: Callable[[Tensor], Tensor] = backbone.norm
        self._embed = backbone.embed_tokens
        device = backbone.device
        self.texts: list[Text] = []
        start = 0
        for ids, prompt in rows:
            self.texts.append(Text(start, len(ids), prompt))
            start += len(ids)
        flat = [token for ids, _ in rows for token in ids]
        self.tokens = torch.tensor(flat, device=device)
        self.normed = torch.empty(
            (start, backbone.hidden_size), dtype=torch.bfloat16, device=device
        )
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        for first in range(0, len(order), batch):
            chosen = [self.texts[index] for index in order[first : first + batch]]
            places, held = self._places(chosen)
            with torch.no_grad():
                made = base.base_model(
                    input_ids=self.tokens[places], attention_mask=held.long(), use_cache=False
                ).last_hidden_state
            self.normed[places[held]] = made[held].to(torch.bfloat16)

    def read(self, text: Text) -> TextStates:
        """Embeddings and normed states of a text, float32."""
        part = slice(text.start, text.start + text.length)
        with torch.no_grad():
            embedded = self._embed(self.tokens[part][1:]).float()
        return TextStates(embedded, self.normed[part].float(), max(0, text.prompt - 1))

    def batch(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, T - 1, d]`` of tokens 1.., and normed states ``[B, T, d]``; padded."""
        places, _ = self._places(texts)
        with torch.no_grad():
            return self._embed(self.tokens[places[:, 1:]]).float(), self.normed[places].float()

    def _places(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Where the tokens of each text lie, and which of ``[B, T]`` are no padding."""
        longest = max(text.length for text in texts)
        device = self.tokens.device
        starts = torch.tensor([text.start for text in texts], device=device)[:, None]
        lengths = torch.tensor([text.length for text in texts], device=device)[:, None]
        steps = torch.arange(longest, device=device)[None]
        return starts + steps.minimum(lengths - 1), steps < lengths


def batch_loss(
    layer: DraftLayer,
    head: Tensor,
    norm: Callable[[Tensor], Tensor],
    embedded: Tensor,
    normed: Tensor,
    texts: Sequence[Text],
    how: DraftTraining,
) -> Tensor:
    """Weighted mean over the drafts of a chain, of all places of a batch that have one.

    Args:
        head: rows of the model's head for the draft vocabulary.
        embedded, normed: what `DeviceTexts.batch` gives.
    """
    outputs = unrolled_batch(layer, embedded, normed[:, :-1], norm, depth=how.depth)
    total, weights = normed.new_zeros(()), 0.0
    size = normed.new_ones(())  # mean square of the states that are wanted
    for step, output in enumerate(outputs):
        rows: list[int] = []
        entries: list[int] = []
        for row, text in enumerate(texts):
            first = max(0, text.prompt - 1) + step
            count = max(0, text.length - 1 - first)
            rows += [row] * count
            entries += range(first, first + count)
        if not rows:
            break
        row_index = torch.tensor(rows, device=normed.device)
        entry_index = torch.tensor(entries, device=normed.device)
        wanted = normed[row_index, entry_index + 1]
        made = norm(output[row_index, entry_index - step])
        with torch.no_grad():
            teacher = F.linear(wanted, head).float().softmax(dim=-1)
            if step == 0:
                size = wanted.square().mean()
        logits = F.linear(made, head).float()
        loss = logits.logsumexp(dim=-1).mean() - (teacher * logits).sum(dim=-1).mean()
        error = (made.float() - wanted).square().mean() / size
        weight = how.decay**step
        total = total + weight * (loss + how.state_weight * error)
        weights += weight
    return total / weights if weights else total


def train_for(
    seconds: float,
    layer: DraftLayer,
    head: Tensor,
    data: DeviceTexts,
    texts: Sequence[Text],
    how: DraftTraining,
    *,
    note: Callable[[int, float, float], None] = lambda step, loss, passes: None,
) -> int:
    """Trains a layer in place for so many seconds; the steps done.

    Args:
        how: `passes` is not looked at.
        note: called now and then with steps, mean loss and passes over the texts so far.
    """
    matrices = [one for one in layer.parameters() if one.dim() > 1]
    gains = [one for one in layer.parameters() if one.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": how.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=how.learning_rate,
        betas=(0.9, 0.95),
    )
    on_gpu = data.tokens.device.type == "cuda"
    layer.train()
    drawn = random.Random(how.seed)
    began, step, seen = time.monotonic(), 0, 0
    waiting: list[Sequence[Text]] = []
    losses: list[Tensor] = []
    while (elapsed := time.monotonic() - began) < seconds:
        if not waiting:
            waiting = _batches(texts, how.texts_per_step, drawn)
        chosen = waiting.pop()
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * schedule(elapsed / seconds, how.warmup)
        optimizer.zero_grad(set_to_none=True)
        embedded, normed = data.batch(chosen)
        with torch.autocast(data.tokens.device.type, torch.bfloat16, enabled=on_gpu):
            loss = batch_loss(layer, head, data.norm, embedded, normed, chosen, how)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step, seen = step + 1, seen + len(chosen)
        if step % _LOOK == 0:
            note(step, float(torch.stack(losses).mean()), seen / len(texts))
            losses.clear()
    layer.eval()
    return step


def _batches(texts: Sequence[Text], size: int, drawn: random.Random) -> list[Sequence[Text]]:
    """All texts in batches of about the same length each, in a drawn order."""
    order = sorted(texts, key=lambda text: text.length + 24 * drawn.random())
    made: list[Sequence[Text]] = [order[at : at + size] for at in range(0, len(order), size)]
    drawn.shuffle(made)
    return made
