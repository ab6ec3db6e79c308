"""Memory: what adaptive decoding needs beyond dense, and a bound on the pending states."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch.profiler import profile

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_heads import FOLD_BUDGET

MOST_OVER_DENSE = 1.15


def peak_bytes(run) -> int:
    """Most bytes of tensors allocated at once while `run` runs, beyond those before it."""
    with profile(profile_memory=True) as watched:
        run()
    held = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("batch", [1, 4])
def test_peak_memory_stays_within_fifteen_percent_of_dense(batch):
    tokenizer = checkpoint.load_tokenizer("tiny")
    question = "Tom has 4 apples and buys 5 more. How many apples does Tom have?"
    ids = tokenizer(question, return_tensors="pt").input_ids.repeat(batch, 1)
    peaks = {}
    for fidelity in ("dense", "exact"):
        # A new model: folded heads and tables count too.
        model = AdaptiveModel.from_pretrained("tiny", fidelity=fidelity)
        weights = sum(weight.nbytes for weight in model.base.parameters())
        peaks[fidelity] = weights + peak_bytes(lambda m=model: m.generate(ids, max_new_tokens=96))
    assert peaks["exact"] <= MOST_OVER_DENSE * peaks["dense"]


def test_folded_heads_are_kept_within_their_budget():
    model = AdaptiveModel.from_pretrained("tiny")
    weights = sum(weight.nbytes for weight in model.base.parameters())
    assert 0 < model.reader().folded_bytes <= FOLD_BUDGET * weights
    # A head that is most of the model is not doubled, and reads alike without.
    wide = AdaptiveModel(tiny_model("llama", vocab_size=3000, tie_word_embeddings=True), [1, 2])
    assert wide.reader().folded_bytes == 0


def test_folded_and_separate_translators_read_alike():
    model = AdaptiveModel(tiny_model("llama", layers=6), [1, 3])
    with torch.no_grad():
        for translator in model.exits.translators:
            translator.up.weight.normal_(std=0.1)
    hidden = torch.randn(3, model.backbone.hidden_size, dtype=torch.float64)
    reader = model.reader()
    normed = model.backbone.norm(hidden)
    for index in range(2):
        reader._folded = {}
        separate = reader.logits(index, normed)
        weight = model.backbone.lm_head.weight
        reader._folded = {index: weight @ model.exits.translators[index].matrix()}
        torch.testing.assert_close(reader.logits(index, normed), separate)


def test_pending_states_do_not_grow_with_the_answer():
    sizes = []
    for tokens in (30, 60):
        model = AdaptiveModel(tiny_model("llama", layers=6), [2])
        out = model.generate(
            random_ids(5),
            max_new_tokens=tokens,
            fidelity="threshold",
            thresholds=1e-9,
            return_dict_in_generate=True,
        )
        sizes.append(out.batch.peak_pending)
    assert sizes[0] == sizes[1] <= model.exit_config.max_pending + 1
