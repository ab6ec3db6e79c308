"""How `deliberate fit` chooses the vocabulary of exits."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import ExitConfig, Translator
from deliberate.train.draft import exit_vocabulary
from deliberate.train.draft.exit_vocabulary import (
    TokenTimes,
    measure_vocabularies,
    with_vocabulary,
)
from deliberate.train.draft.fit_card import write_card
from deliberate.train.draft.hidden_cache import collect
from deliberate.train.draft.translators import ExitAgreement

# SmolLM2-135M in layers: its head costs as much as 8.
TIMES = TokenTimes(layer=1.0, deferred=0.1, head=8.0, layers=30)


def agreement(layer: int, exits: float) -> ExitAgreement:
    return ExitAgreement(layer, 0.8, 0.9 if exits else math.inf, exits)


def test_a_token_with_exits_pays_readings_and_saves_layers_and_the_head() -> None:
    assert TIMES.dense == 38.0
    assert TIMES.with_exits([], 5.0) == 38.0
    # 24 layers and a reading; a tenth of the deferred layers for the half that exits.
    found = TIMES.with_exits([agreement(24, 0.5)], 0.7)
    assert found == pytest.approx(24.7 + 0.5 * 6 * 0.1 + 0.5 * 14)
    # An exit above takes those that the lower one has not taken.
    both = TIMES.with_exits([agreement(18, 0.25), agreement(24, 0.5)], 0.7)
    assert both == pytest.approx(18.7 + 0.25 * 1.2 + 0.75 * 6.7 + 0.25 * 0.6 + 0.5 * 14)
    # The whole head at the exit costs what it may save.
    assert TIMES.with_exits([agreement(24, 0.5)], 8.0) > TIMES.dense - 0.5


def test_sizes_are_compared_by_seconds_and_rare_tokens_count_against_small_ones(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(exit_vocabulary, "SIZES", (4, 24))
    monkeypatch.setattr(exit_vocabulary, "token_times", lambda backbone: TIMES)
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    config = ExitConfig.build(4, [2, 3], translator=Translator.FULL)
    model = AdaptiveModel(base, config, executor="generic")
    with torch.no_grad():
        for translator in model.exits.translators:
            translator.delta.weight.add_(0.05 * torch.randn_like(translator.delta.weight))
    texts = [(random_ids(30, seed=seed)[0].tolist(), 3) for seed in range(8)]
    cache = collect(
        tmp_path, model.backbone, texts, (2, 3, 4), source={"model": "tiny"}, most_tokens=10_000
    )
    counted = cache.tokens()
    said: list[str] = []
    found = measure_vocabularies(
        model.exits, model.backbone, cache, cache.texts, counted, target=0.99, say=said.append
    )
    assert [one.size for one in found] == [4, 24]
    assert found[0].exits[1].agreement < found[1].exits[1].agreement
    assert all(one.seconds_per_token <= one.dense_seconds for one in found)
    assert all(
        "no exit pays" in line for line, one in zip(said, found, strict=True) if not one.used
    )
    (whole,) = measure_vocabularies(
        model.exits, model.backbone, cache, cache.texts, counted, target=0.99, wanted=0
    )
    assert whole.size == 0 and whole.exits[1].agreement >= found[1].exits[1].agreement


def test_another_vocabulary_keeps_translators() -> None:
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    config = ExitConfig.build(4, [2], translator=Translator.FULL)
    model = AdaptiveModel(base, config, executor="generic")
    with torch.no_grad():
        model.exits.translators[0].delta.weight.fill_(0.5)
    some = with_vocabulary(model.exits, torch.tensor([3, 5, 8]))
    assert some.vocabulary.tolist() == [3, 5, 8] and some.config.vocabulary == 3
    back = with_vocabulary(some, None)
    assert back.vocabulary is None and bool((back.translators[0].delta.weight == 0.5).all())


def test_the_card_of_a_kept_draft_layer_says_where_its_figures_are_from(tmp_path) -> None:
    vocabulary = {
        "size": 2048, "read_seconds": 0.0003, "used": [], "seconds_per_token": 0.04,
        "dense_seconds": 0.04,
    }  # fmt: skip
    size = {
        "size": 64, "draft_seconds": 0.0002, "survives": [0.5], "drafts": 1,
        "seconds_per_token": 0.01,
    }  # fmt: skip
    before = {
        "date": "2026-01-02", "texts": {"fitted": 7, "held_out": 3}, "tokens": {"answers": 1234},
        "draft_vocabulary": [size], "chosen": size,
    }  # fmt: skip
    record = {
        "model": "smollm2-draft", "date": "2026-02-03", "texts": {"fitted": 5, "held_out": 2},
        "tokens": {"answers": 99, "held_out": 9}, "exits": [], "exit_vocabulary": [vocabulary],
        "draft_vocabulary": [], "chosen": None, "seconds": {"exits": 1.0}, "kept_draft": before,
    }  # fmt: skip
    card = write_card(tmp_path, record).read_text()
    assert "exits over 2048 tokens: 0.30 ms a reading" in card and "no exit pays" in card
    assert "The draft layer is that of smollm2-draft, fitted on 2026-01-02 to 1,234" in card
    assert "| 64 (taken) | 0.20 | 0.50 | 1 | 10.00 |" in card
    assert (
        "The draft layer is that of"
        not in write_card(
            tmp_path, record | {"kept_draft": None, "chosen": size, "draft_vocabulary": [size]}
        ).read_text()
    )
