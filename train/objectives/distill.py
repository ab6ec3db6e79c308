"""Progressive distillation: the deepest exit, which has least to learn, first."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from deliberate.api.model import AdaptiveModel
from deliberate.train.curricula import ExitCurriculum
from deliberate.train.losses import ExitScale, distillation_loss, token_cross_entropy
from deliberate.train.objectives.base import Recipe
from deliberate.train.objectives.layerskip import LayerSkipObjective
from deliberate.train.objectives.teacher_states import TeacherStates
from deliberate.train.setting_checks import check_choice, check_whole
from deliberate.utils.errors import DeliberateError


class DistillObjective(LayerSkipObjective):
    """Exits, and with a teacher the whole model, learn from a teacher's distribution.

    Per target token of each active exit: ``kl_weight * KL(teacher || exit) + ce_weight * CE(exit,
    target)``. Without a teacher the exits learn from the model's own last layer, whose own loss is
    the cross-entropy of the targets.

    Args:
        scale, early_scale, layer_dropout, gate_weight, gradual_share: as in `LayerSkipObjective`;
            the curriculum is gradual.
        kl_weight, ce_weight: of the two parts.
        temperature: of the divergence.
        teacher: a causal language model whose head has the student's tokens; kept out of the
            objective's parameters, frozen, in evaluation mode.
        keep_teacher: a text that is drawn again costs no pass of the teacher: its last states are
            kept, 4 d bytes a target token.
        head_tokens: the losses are taken over so many rows of the head: the tokens of the training
            texts, and then the lowest ids, which byte-pair encoders merged first and are frequent.
            None: over all.
        train_head: the embeddings and the head learn too.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        scale: ExitScale | str = ExitScale.UNIFORM,
        early_scale: float = 1.0,
        layer_dropout: float = 0.0,
        gate_weight: float = 0.1,
        gradual_share: float = 0.5,
        kl_weight: float = 1.0,
        ce_weight: float = 0.5,
        temperature: float = 1.0,
        teacher: nn.Module | None = None,
        keep_teacher: bool = False,
        head_tokens: int | None = None,
        train_head: bool = True,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            early_scale=early_scale,
            layer_dropout=layer_dropout,
            gate_weight=gate_weight,
            curriculum=ExitCurriculum.GRADUAL,
            gradual_share=gradual_share,
        )
        self.kl_weight, self.ce_weight, self.temperature = kl_weight, ce_weight, temperature
        # In a tuple nn.Module does not see it: it is neither trained nor saved nor wrapped.
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)
        self._states = TeacherStates(self._teacher[0], keep=keep_teacher) if self._teacher else None
        self._head_tokens = head_tokens
        self._rows: Tensor | None = None
        self._places: Tensor | None = None
        if not train_head:
            model.base.get_input_embeddings().requires_grad_(False)
            model.backbone.lm_head.requires_grad_(False)

    def prepare(self, tokens: Collection[int] | None) -> None:
        """Chooses the tokens that the losses are taken over, where some were asked for.

        Raises:
            DeliberateError: some were, and what the texts hold is not known.
        """
        size = self.model.backbone.vocab_size
        if self._head_tokens is None or self._head_tokens >= size:
            return
        if tokens is None:
            raise DeliberateError(
                f"recipe.head_tokens={self._head_tokens} where problems are drawn, whose "
                "tokens are not known before: leave it out, or train on texts (data=file)"
            )
        rows = set(tokens)
        others = (one for one in range(size) if one not in rows)
        rows |= set(islice(others, max(0, self._head_tokens - len(rows))))
        device = self.model.backbone.device
        self._rows = torch.tensor(sorted(rows), device=device)
        self._places = torch.zeros(size, dtype=torch.int64, device=device)
        self._places[self._rows] = torch.arange(len(self._rows), device=device)

    def logits(self, normed: Tensor) -> Tensor:
        """Of all tokens, or of `head_tokens`."""
        return self.model.backbone.head_logits(normed, self._rows)

    def classes(self, targets: Tensor) -> Tensor:
        """Places among those."""
        return targets if self._places is None else self._places[targets]

    @torch.no_grad()
    def teacher_logits(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
    ) -> Tensor | None:
        """The teacher's logits ``[N, V]`` at the target positions, over the student's tokens."""
        if self._states is None:
            return None
        states, backbone = self._states.read(input_ids, labels, position_ids), self._states.backbone
        return backbone.head_logits(states, self._rows)[:, : self.model.backbone.vocab_size]

    def exit_teacher(self, teacher: Tensor | None, top: Tensor) -> Tensor | None:
        """The teacher's logits, or the model's own last ones."""
        return top.detach() if teacher is None else teacher

    def token_loss(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """Divergence from the teacher and cross-entropy of the target; without a teacher, at the
        last layer, the latter alone."""
        truth = token_cross_entropy(logits, targets)
        if teacher is None:
            return truth
        width = min(logits.shape[-1], teacher.shape[-1])  # heads may be padded differently
        learned = distillation_loss(
            logits[:, :width], teacher[:, :width], temperature=self.temperature
        )
        return self.kl_weight * learned + self.ce_weight * truth


def check_teacher(cfg: DictConfig) -> None:
    """A model from random weights needs a teacher, and a part of the head some rows."""
    if cfg.recipe.get("head_tokens") is not None:
        check_whole(cfg, "recipe.head_tokens", least=1)
    for key in ("keep_teacher", "train_head"):
        if key in cfg.recipe:
            check_choice(cfg, f"recipe.{key}", (True, False))
    if cfg.recipe.get("keep_teacher") and cfg.recipe.get("teacher") is None:
        raise DeliberateError(
            "recipe.keep_teacher=true without a teacher: give recipe.teacher=FOLDER, or leave it "
            "out"
        )
    if cfg.model.kind == "scratch" and cfg.recipe.get("teacher") is None:
        raise DeliberateError(
            "recipe 'distill' from scratch needs a teacher: give recipe.teacher=FOLDER"
        )


RECIPE = Recipe(DistillObjective, from_scratch=True, check=check_teacher)
