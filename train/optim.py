"""Optimizers: AdamW, and Muon for hidden matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deliberate.utils.errors import DeliberateError

OPTIMIZERS = ("adamw", "muon")


class MuonWithAdamW(Optimizer):
    """Muon for 2-D hidden weights and AdamW for embeddings, norms and gates, as one optimizer.

    Muon orthogonalises the momentum of a matrix (Jordan et al., 2024); its update is scaled to
    AdamW's root mean square (Moonshot, 2025, arXiv:2502.16982), so one learning rate serves both.
    Schedulers see ordinary param_groups; a checkpoint holds the state of both parts.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        self._parts: tuple[Optimizer, ...] = (
            torch.optim.Muon(
                list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(list(others), lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.defaults = {"lr": lr, "weight_decay": weight_decay}
        # The parts' own group dicts, so that a scheduler's change of lr reaches them.
        super().__init__([g for part in self._parts for g in part.param_groups], self.defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        start = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            start += count

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of both parts."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of both parts."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`'s form."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [g for part in self._parts for g in part.param_groups]


def build_optimizer(model: nn.Module, name: str, *, lr: float, weight_decay: float) -> Optimizer:
    """The optimizer over the trainable parameters of `model`.

    Muon takes 2-D weights of hidden layers; embeddings, the LM head, norms, biases and gates go to
    AdamW, as its authors advise.
    """
    if name not in OPTIMIZERS:
        raise DeliberateError(
            f"optimizer {name!r} is unknown; it is one of {', '.join(OPTIMIZERS)}"
        )
    if lr <= 0:
        raise DeliberateError(f"learning rate {lr} must be above 0")
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise DeliberateError("nothing to train: every parameter of the model is frozen")
    outside = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    matrices, others = [], []
    for parameter_name, parameter in trainable:
        hidden = parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in outside
        if hidden and "lm_head" not in parameter_name and "embed_out" not in parameter_name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    if name == "muon" and matrices and others:
        return MuonWithAdamW(matrices, others, lr=lr, weight_decay=weight_decay)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98))
