"""The draft vocabulary of exits: how many rows of the head they read, by measured seconds.

An exit over all tokens costs as much as the head, of SmolLM2-135M as much as 8 layers; over a few
thousand frequent tokens a tenth of that (FR-Spec, arXiv:2502.14856). What such an exit cannot
choose counts as a disagreement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.modeling.head_rows import head_rows
from deliberate.train.draft.costs import head_seconds, pass_seconds, read_seconds
from deliberate.train.draft.hidden_cache import HiddenCache, Text
from deliberate.train.draft.translators import ExitAgreement, measure_exits
from deliberate.train.draft.vocabulary import frequent_tokens

# Sizes that are measured, where the head has more rows than twice the first.
SIZES = (2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class ExitVocabulary:
    """What exits over a vocabulary of one size are worth.

    Attributes:
        size: rows that they read; 0 for all.
        read_seconds: of evaluating one exit.
        exits: agreement, threshold and share of exiting tokens of each.
        used: layers of the exits with which a token takes the fewest seconds; empty for none.
        seconds_per_token: with those, at their thresholds.
        dense_seconds: of a token at full depth without exits.
    """

    size: int
    read_seconds: float
    exits: tuple[ExitAgreement, ...]
    used: tuple[int, ...]
    seconds_per_token: float
    dense_seconds: float


@dataclass(frozen=True)
class TokenTimes:
    """Seconds of the parts of a token.

    Attributes:
        layer: of one layer for one token.
        deferred: of one layer for one more token in the same pass.
        head: of the whole head.
        layers: number of layers.
    """

    layer: float
    deferred: float
    head: float
    layers: int

    @property
    def dense(self) -> float:
        """Of a token at full depth."""
        return self.layers * self.layer + self.head

    def with_exits(self, exits: Sequence[ExitAgreement], read: float) -> float:
        """Of a token where each exit is evaluated for those that no exit below has taken.

        A share that reaches the threshold of one exit is taken to reach those above it, too.
        """
        left, total, below, taken = 1.0, 0.0, 0, 0.0
        for one in exits:
            total += left * ((one.layer - below) * self.layer + read)
            exiting = max(0.0, one.exits - taken)
            total += exiting * (self.layers - one.layer) * self.deferred
            left, taken, below = left - exiting, taken + exiting, one.layer
        return total + left * ((self.layers - below) * self.layer + self.head)


def token_times(backbone: Backbone) -> TokenTimes:
    """Measured on this machine."""
    single, more = pass_seconds(backbone)
    head, layers = head_seconds(backbone), backbone.num_layers
    return TokenTimes(max(0.0, single - head) / layers, more / layers, head, layers)


def measure_vocabularies(
    exits: ExitHeads,
    backbone: Backbone,
    cache: HiddenCache,
    held: Sequence[Text],
    counted: Tensor,
    *,
    target: float,
    wanted: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[ExitVocabulary]:
    """Exits over vocabularies of some sizes, measured on held-out answers.

    Args:
        exits: fitted, over all tokens.
        counted: tokens of the fitted answers, which decide what is frequent.
        target: share of exiting tokens that is to agree.
        wanted: only this size; 0 for all tokens; None: those of `SIZES` that are worth their name,
            and all tokens where there are none.
    """
    rows, times, found = backbone.vocab_size, token_times(backbone), []
    sizes = [size for size in SIZES if 2 * size <= rows] or [0]
    for size in sizes if wanted is None else [wanted if wanted < rows else 0]:
        trial = with_vocabulary(exits, frequent_tokens(counted, size, rows) if size else None)
        each = read_seconds(_reader(trial, backbone), backbone, len(trial.config.layers))
        agreement = measure_exits(
            trial, cache, held, backbone.norm, _head_of(backbone, trial.vocabulary),
            backbone.head_logits, target=target,
        )  # fmt: skip
        subsets = [
            chosen
            for count in range(len(agreement) + 1)
            for chosen in combinations(agreement, count)
            if all(one.exits > 0 for one in chosen)
        ]
        best = min(subsets, key=lambda chosen: times.with_exits(chosen, each))
        seconds = times.with_exits(best, each)
        used = tuple(one.layer for one in best)
        found.append(ExitVocabulary(size, each, tuple(agreement), used, seconds, times.dense))
        say(
            f"exits over {size or rows} tokens: "
            + ", ".join(f"after layer {one.layer} {one.exits:.0%} exit" for one in agreement)
            + f" at {target:.0%} agreement, {each * 1e3:.2f} ms a reading: "
            f"{seconds * 1e3:.2f} ms a token against {times.dense * 1e3:.2f} at full depth"
            + ("" if used else ": no exit pays")
        )
    return found


def with_vocabulary(exits: ExitHeads, ids: Tensor | None) -> ExitHeads:
    """The same translators and gates over these tokens, rising; None for all."""
    config: ExitConfig = replace(exits.config, vocabulary=0 if ids is None else len(ids))
    like = next(exits.parameters())
    made = ExitHeads(config, exits.gates[0].in_features)  # type: ignore[arg-type]
    made = made.to(device=like.device, dtype=like.dtype)
    kept = {name: one for name, one in exits.state_dict().items() if name != "vocabulary"}
    made.load_state_dict(kept if ids is None else kept | {"vocabulary": ids})
    return made.train(exits.training)


def _reader(exits: ExitHeads, backbone: Backbone) -> ExitReader:
    if isinstance(backbone, FusedBackbone):
        return backbone.exit_reader(exits, model_bytes=0)
    return ExitReader(
        exits, backbone.norm, backbone.lm_head, backbone.head_logits, backbone.softcap,
        model_bytes=0,
    )  # fmt: skip


def _head_of(backbone: Backbone, ids: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Normed states -> logits of these tokens."""
    if ids is None:
        return backbone.head_logits
    rows, bias = head_rows(backbone.lm_head, ids)
    softcap: Any = backbone.softcap
    return lambda normed: softcap(torch.nn.functional.linear(normed, rows.to(normed.dtype), bias))
