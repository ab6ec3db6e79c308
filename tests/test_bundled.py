"""The bundled model: exact equals dense on real answers, and it is what its card says."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

import pytest
import torch

from deliberate import storage
from deliberate.eval.answers import extract_answer
from deliberate.model import AdaptiveModel
from deliberate.train.batches import Encoder
from deliberate.train.words import word_problems

PROMPTS, CHUNKS = 500, 20
MEGABYTE = 10**6


@cache
def bundled() -> tuple[AdaptiveModel, Encoder]:
    tokenizer = storage.load_tokenizer("tiny")
    return AdaptiveModel.from_pretrained("tiny"), Encoder(tokenizer, max_tokens=10**6)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_exact_equals_dense_on_500_prompts_token_for_token(chunk):
    model, encoder = bundled()
    size = PROMPTS // CHUNKS
    drafted = accepted = 0
    for problem in word_problems("test", size=size, seed=9_000 + chunk):
        ids = torch.tensor([encoder.prompt(problem.question)])
        dense = model.generate(ids, max_new_tokens=64, fidelity="dense")
        exact = model.generate(
            ids, max_new_tokens=64, fidelity="exact", return_dict_in_generate=True
        )
        assert torch.equal(exact.sequences, dense), problem.question
        drafted += exact.trace.drafted
        accepted += sum(layer < 8 for layer in exact.trace.exit_layers)
    assert accepted > 0.3 * drafted > 0, (
        "most tokens would have to be drafted for this to test much"
    )


def test_it_answers_one_step_problems():
    model, encoder = bundled()
    right = 0
    for problem in word_problems("test", size=20, seed=5, steps=(1, 1)):
        ids = torch.tensor([encoder.prompt(problem.question)])
        out = model.generate(ids, max_new_tokens=64)
        text = encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right += extract_answer(text, "gsm8k") == problem.answer
    assert right >= 12


def test_it_fits_in_16_megabytes_and_carries_its_card():
    folder = Path(str(resources.files("deliberate.models") / "tiny"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * MEGABYTE
    card = (folder / "README.md").read_text(encoding="utf-8")
    for needed in ("## Training", "## Accuracy", "seed", "gsm8k", "by difficulty"):
        assert needed in card


def test_digits_are_single_tokens_and_any_text_survives_the_tokenizer():
    tokenizer = bundled()[1].tokenizer
    assert len(tokenizer.encode("90210", add_special_tokens=False)) == 5
    text = "Zoë pays €3.50 — “why?” 你好\n\t#### 7"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_its_exits_are_where_the_card_says_and_below_the_top():
    model, _ = bundled()
    layers = model.exit_config.layers
    assert len(layers) >= 3 and model.backbone.num_layers >= 8
    assert layers[-1] < model.backbone.num_layers
