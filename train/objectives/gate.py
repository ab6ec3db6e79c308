"""Training of the deliberation gate: backbone and exits frozen, the gate learns from token losses.

Teacher-forced: the final hidden states of a text are computed once without gradients, and
`run_rounds` runs the deliberation rounds for all uncertain target tokens at once, by the rule that
decoding uses.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.kernels.ops.exit_head import top_probability
from deliberate.modeling.deliberation_gate import (
    DeliberationGate,
    GateBlock,
    GateConfig,
    run_rounds,
)
from deliberate.train.losses import token_cross_entropy
from deliberate.train.objectives.base import Objective, ObjectiveOutput, Recipe
from deliberate.train.saving import whole_state
from deliberate.train.setting_checks import check_number
from deliberate.utils.errors import DeliberateError

STARTS = ("auto", "zero", "last_layer")


@torch.no_grad()
def copy_layer(gate: DeliberationGate, layer: Any, scale: float) -> bool:
    """Starts the gate's block from a Llama-like decoder layer; False where their shapes differ."""
    block, parts = gate.block, [*layer.named_parameters()]
    found = {name: value for name, value in parts if name.endswith(".weight")}
    names = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    names += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    fits = gate.config.block is GateBlock.TRANSFORMER and set(found) == {*names, *norms}
    if not fits or len(parts) != len(found) or layer.self_attn.head_dim != block.head_dim:
        return False
    q, k, v, out, first, second, down = (found[name] for name in names)
    target = [
        (block.q.weight, q),
        (block.kv.weight, torch.cat((k, v))),
        (block.out.weight, scale * out),
        (block.up.weight, torch.cat((first, second))),
        (block.down.weight, scale * down),
        (gate.norm.weight, found[norms[0]]),
        (block.memory_norm.weight, found[norms[0]]),
        (block.mlp_norm.weight, found[norms[1]]),
    ]
    if any(mine.shape != theirs.shape for mine, theirs in target):
        return False
    for mine, theirs in target:
        mine.copy_(theirs)
    return True


class GateObjective(Objective):
    """Cross-entropy after the deliberation rounds, plus ``penalty`` times g of every round taken.

    Both are means over the step's target tokens. A token that takes no round has the backbone's
    loss, which the gate cannot change; it is left out of the gradient. Where a token takes several
    rounds its cross-entropy is the mean over the states after each.

    Args:
        gate_threshold: `GateConfig.think_below`: a token takes another round while its largest
            probability is below it.
        rounds, block, width, heads, gated: of `GateConfig`.
        initial_threshold: gate threshold of the first `initial_share` of the run, at least
            `gate_threshold`. It shows the gate more tokens than decoding will.
        initial_share: in [0, 1].
        start: ``zero``, an untrained gate; ``last_layer``, a copy of the last decoder layer, which
            can read final states already (Llama-like layers of the same shape); ``auto``: a copy
            where the shapes agree, else zero.
        start_scale: factor on the copied output matrices; a gate measures its change in units of
            the state's root mean square, a layer does not.
        penalty: nats that a round with g = 1 must gain to be worth taking.
        smoothing: label smoothing, against overconfidence on few uncertain tokens.

    Raises:
        DeliberateError: an impossible setting, or a model that has another gate.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        *,
        rounds: int = 1,
        gate_threshold: float = 0.80,
        block: GateBlock | str = GateBlock.TRANSFORMER,
        width: int = 512,
        heads: int = 4,
        gated: bool = True,
        initial_threshold: float = 0.99,
        initial_share: float = 1.0,
        start: str = "auto",
        start_scale: float = 0.07,
        penalty: float = 0.0,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__(model)
        for name, value, least, most in (
            ("initial_threshold", initial_threshold, gate_threshold, 2.0),
            ("initial_share", initial_share, 0.0, 1.0),
            ("penalty", penalty, 0.0, float("inf")),
            ("smoothing", smoothing, 0.0, 0.99),
            ("start_scale", start_scale, 0.0, float("inf")),
        ):
            if not least <= value <= most:
                raise DeliberateError(f"recipe.{name}={value} must be within [{least}, {most}]")
        if start not in STARTS:
            raise DeliberateError(f"recipe.start={start!r} is not one of {', '.join(STARTS)}")
        new = model.gate is None
        model.requires_grad_(False)
        kind = GateBlock(block) if block in list(GateBlock) else block
        config = GateConfig(rounds, gate_threshold, kind, width, heads, gated)  # type: ignore[arg-type]
        self.gate = model.attach_gate(config).requires_grad_(True)
        if new and start != "zero":
            copied = copy_layer(self.gate, model.backbone.layers[-1], start_scale)
            if start == "last_layer" and not copied:
                raise DeliberateError(
                    "recipe.start=last_layer needs block=transformer and a Llama-like layer of the "
                    f"gate's heads={heads} and width={width}: use recipe.start=zero"
                )
        self.initial_threshold, self.initial_share = initial_threshold, initial_share
        self.penalty, self.smoothing = penalty, smoothing

    def train(self, mode: bool = True) -> GateObjective:
        """Training mode for the gate only: the frozen backbone keeps its dropout off."""
        super().train(mode)
        self.model.base.eval()
        return self

    def plain_state(self) -> dict[str, Tensor]:
        """The state as any adaptive model with a gate has it."""
        return whole_state(self.model)

    def gate_threshold(self) -> float:
        """The gate threshold of this step."""
        initial = self.step < self.initial_share * self.steps
        return self.initial_threshold if initial else self.gate.config.think_below

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch ``[B, T]``; `num_items_in_batch` is the step's count of targets."""
        backbone = self.model.backbone
        following = torch.full_like(labels, IGNORE_INDEX)
        following[:, :-1] = labels[:, 1:]
        predicts = following != IGNORE_INDEX
        packed = {} if position_ids is None else {"position_ids": position_ids}
        with torch.no_grad():
            last = self.model(input_ids, output_exit_states=True, **packed).last
            top = backbone.logits(last[predicts])
            answer, probability = top_probability(top)
        targets, threshold = following[predicts], self.gate_threshold()
        doubt = probability < threshold
        uncertain = torch.zeros_like(predicts)
        uncertain[predicts] = doubt
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        # Wrappers for several processes wait for a gradient of every parameter.
        total = 0.0 * torch.stack([p.sum() for p in self.gate.parameters()]).sum()
        before = token_cross_entropy(top, targets)
        sums = self.log_sums(
            [*[None] * len(self.model.exit_config.layers), before],
            [*[None] * len(self.model.exit_config.layers), answer],
            targets,
        )
        after = self._deliberate(last, uncertain, following[uncertain], threshold, position_ids)
        total = total + after.pop("total")
        sums |= after | {
            "tokens/doubt": doubt.sum(),
            "before/doubt": (answer == targets)[doubt].sum(),
            "loss/gate": before - token_cross_entropy(top[doubt], targets[doubt]) + after["loss"],
        }
        del sums["loss"]
        return ObjectiveOutput(loss=total / count, sums=sums, measured=None)

    def _deliberate(
        self,
        last: Tensor,
        uncertain: Tensor,
        targets: Tensor,
        threshold: float,
        position_ids: Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss to differentiate, summed over tokens, and what is logged of the rounds."""
        nothing = torch.zeros((), device=last.device)
        if not len(targets):
            return dict.fromkeys(("total", "loss", "after/doubt", "rounds", "g/doubt"), nothing)
        logits: Any = self.model.backbone.logits
        taken = run_rounds(
            self.gate, last, uncertain, logits, position_ids=position_ids, think_below=threshold
        )
        total = nothing
        for state, fires, g in zip(*taken, strict=True):
            loss = cross_entropy(
                logits(state).float(), targets, reduction="sum", label_smoothing=self.smoothing
            )
            total = total + loss / len(taken.states) + self.penalty * g[fires].sum()
        refined = logits(taken.states[-1]).detach()
        return {
            "total": total,
            "loss": token_cross_entropy(refined, targets),
            "after/doubt": (refined.argmax(dim=-1) == targets).sum(),
            "rounds": taken.rounds.sum(),
            "g/doubt": taken.gates[0].detach().sum(),
        }


def check_gate(cfg: DictConfig) -> None:
    """The gate's configuration, and the settings of its training."""
    form = {f.name: cfg.recipe.get(f.name) for f in fields(GateConfig)}
    GateConfig.from_dict(form | {"think_below": cfg.recipe.gate_threshold})
    for name in ("initial_threshold", "initial_share", "penalty", "smoothing", "start_scale"):
        check_number(cfg, f"recipe.{name}", "at least 0", lambda value: value >= 0)


RECIPE = Recipe(GateObjective, keeps_base=True, check=check_gate)
