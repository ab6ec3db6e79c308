"""What a teacher says of a text, kept from one step that trains on the text to the next.

A teacher's pass is a quarter to a half of a distillation step. Its last states take 4 d bytes a
target token, 2.3 KB for SmolLM2, where its logits would take 196 KB; the head makes these again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deliberate.config import IGNORE_INDEX
from deliberate.modeling.backbone import Backbone


class TeacherStates:
    """The last normed states of a teacher at the targets of each row of a batch.

    Args:
        teacher: a causal language model in evaluation mode.
        keep: a row that was read before is not read again.
    """

    def __init__(self, teacher: nn.Module, *, keep: bool) -> None:
        self.model, self.keep = teacher, keep
        self.backbone = Backbone(teacher)  # type: ignore[arg-type]
        self._base: Any = teacher.base_model
        self._kept: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def read(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None) -> Tensor:
        """States ``[N, d]`` at the target positions of a batch ``[B, T]``, row after row."""
        self.model.to(input_ids.device)
        predicts = labels[:, 1:] != IGNORE_INDEX
        keys = [_key(ids, told) for ids, told in zip(input_ids, labels, strict=True)]
        new = [row for row, key in enumerate(keys) if key not in self._kept]
        found: dict[bytes, Tensor] = {}
        if new:
            # Padding is on the right; what it takes away is not needed.
            width = int(predicts[new].any(dim=0).nonzero().max()) + 1 if predicts[new].any() else 1
            packed = None if position_ids is None else position_ids[new, :width]
            states = self._base(
                input_ids=input_ids[new, :width], position_ids=packed, use_cache=False
            ).last_hidden_state
            for place, row in enumerate(new):
                found[keys[row]] = states[place][predicts[row, :width]]
            if self.keep:
                self._kept |= found
        return torch.cat([found[key] if key in found else self._kept[key] for key in keys])


def _key(ids: Tensor, labels: Tensor) -> bytes:
    """Of a row: its tokens up to the last target, and which of them are targets."""
    told = (labels != IGNORE_INDEX).cpu()
    last = int(told.nonzero().max()) + 1 if told.any() else 0
    tokens: bytes = ids[:last].cpu().numpy().tobytes()
    flags: bytes = told[:last].numpy().tobytes()
    return tokens + flags
