"""The bundled `tiny-chain`: it reasons between its tags, and stopping it early saves tokens."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

import pytest

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data.chains import CLOSE_TAG, OPEN_TAG, chain_problems
from deliberate.data.prompts import Encoder
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.grading.answers import extract_answer
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import blank_tokens, marks_of, reasoning_tags, utf8_ends
from deliberate.reasoning.registry import chain_policy
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.token_budget import BudgetSettings

PROBLEMS = 20


@cache
def results(policy: str, fidelity: str = "dense", limit: int | None = None):
    """Right answers, and the results, of the first test problems."""
    tokenizer = checkpoint.load_tokenizer("tiny-chain")
    encoder = Encoder(tokenizer, max_tokens=10**6)
    chosen = {"probe": {"chunk": 32, "agree": 2}} if policy else None

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    model = AdaptiveModel.from_pretrained("tiny-chain")
    runner = ChainRunner(
        model.engine(), marks_of(tokenizer, answer="\n#### "), tokenizer.decode,
        end_tokens=[tokenizer.eos_token_id], ends=utf8_ends(tokenizer),
        blank=blank_tokens(tokenizer),
    )  # fmt: skip
    problems = list(chain_problems("test", size=PROBLEMS, seed=5))
    done = runner.run(
        [
            ChainRequest(
                encoder.prompt(problem.question),
                BudgetSettings(640, limit, 16),
                chain_policy(chosen, encode) if chosen else None,
                DecodingSpec(fidelity=fidelity, gate=False),
            )
            for problem in problems
        ]
    )
    texts = [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in done]
    right = sum(
        extract_answer(text, "gsm8k") == problem.answer
        for text, problem in zip(texts, problems, strict=True)
    )
    return right, done, texts


def test_it_reasons_between_its_tags_and_answers():
    right, done, texts = results("")
    assert right >= PROBLEMS // 2
    assert all(text.count(OPEN_TAG) == text.count(CLOSE_TAG) == 1 for text in texts)
    assert all(one.finished and one.answer for one in done)


def test_probes_halve_the_reasoning_and_answer_nearly_as_well():
    right, whole, _ = results("")
    stopped_right, stopped, _ = results("probe")
    assert stopped_right >= right - PROBLEMS // 6
    tokens = [sum(one.reasoning_tokens for one in done) for done in (stopped, whole)]
    assert tokens[0] < tokens[1] / 2
    assert all(one.probes for one in stopped if one.stopped)


def test_exact_mode_gives_the_chains_of_dense_with_and_without_probes():
    for policy in ("", "probe"):
        dense, exact = results(policy)[1], results(policy, "exact")[1]
        assert [one.tokens for one in exact] == [one.tokens for one in dense]


@pytest.mark.parametrize("limit", [0, 20])
def test_a_budget_holds_and_leaves_an_answer(limit):
    done = results("", "dense", limit)[1]
    assert all(one.reasoning_tokens <= limit and one.answer for one in done)


def test_it_fits_in_16_megabytes_and_carries_its_card():
    folder = Path(str(resources.files("deliberate.checkpoints") / "tiny-chain"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 10**6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for needed in ("## Training", "## Accuracy", "seed", "chains"):
        assert needed in card


def test_its_configuration_names_its_tags_since_no_token_of_its_own_shows_them():
    model = AdaptiveModel.from_pretrained("tiny-chain")
    tokenizer = checkpoint.load_tokenizer("tiny-chain")
    assert reasoning_tags(tokenizer, model.config) == (OPEN_TAG, CLOSE_TAG)
