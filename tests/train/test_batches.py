"""Micro-batches as a pure function of (seed, index), and the tokenizer that makes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.api.checkpoint import load_tokenizer
from deliberate.config import IGNORE_INDEX
from deliberate.data.problem import Problem
from deliberate.data.word_problems import MAX_STEPS, word_problems
from deliberate.train.batches import (
    Encoder,
    Example,
    MixtureBatches,
    _cut,
    collate,
    curriculum_steps,
    prompt_text,
)
from deliberate.train.tokenizer import train_tokenizer
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        f"{prompt_text(p.question)} {p.solution}" for p in word_problems("train", size=200, seed=9)
    ]
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, max_tokens=256)


def numbered(count, text="Add one to {}."):
    return [Problem(str(n), text.format(n), str(n + 1), f"{n} + 1 = {n + 1}") for n in range(count)]


def mixture(encoder, weights=None, fixed=None, **settings):
    defaults = {"pools": 6, "parts": 3, "tokens_per_step": 600, "seed": 1}
    weights = weights or {"words": 1.0}
    return MixtureBatches(encoder, fixed or {}, weights, **(defaults | settings))


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in (left | right).keys() - {"index"})


def test_a_micro_batch_hangs_on_seed_and_index_alone(encoder):
    weights, fixed = {"words": 0.5, "sums": 0.5}, {"sums": numbered(50)}
    forward = mixture(encoder, weights, fixed)
    backward = mixture(encoder, weights, fixed)
    ordered = [forward[i] for i in range(len(forward))]
    assert len(ordered) == 18
    for index in [17, 0, 5, 4, 16, 5]:
        assert same(backward[index], ordered[index])
    other = mixture(encoder, weights, fixed, seed=2)
    assert not same(other[0], ordered[0])
    assert not same(ordered[0], ordered[3])


def test_labels_are_the_answer_tokens_and_padding_is_on_the_right(encoder, tokenizer):
    batch = mixture(encoder, tokens_per_step=1500)[0]
    assert batch.pop("index") == 0
    for ids, labels, mask in zip(*batch.values(), strict=True):
        size = int(mask.sum())
        assert mask[:size].all() and not mask[size:].any()
        assert (ids[size:] == tokenizer.pad_token_id).all()
        assert (labels[size:] == IGNORE_INDEX).all()
        start = int((labels != IGNORE_INDEX).nonzero()[0])
        assert (labels[:start] == IGNORE_INDEX).all()
        assert torch.equal(labels[start:size], ids[start:size])
        assert ids[0] == tokenizer.bos_token_id
        prompt, answer = tokenizer.decode(ids[1:start]), tokenizer.decode(labels[start:size])
        assert prompt.startswith("Question: ") and prompt.endswith("\nAnswer:")
        assert "\n#### " in answer and answer.endswith(tokenizer.eos_token)


def test_a_pool_holds_its_tokens_in_filled_parts_sorted_by_length(encoder):
    batches = mixture(encoder)
    for index in range(batches.pools):
        parts = batches.pool(index)
        assert len(parts) == batches.parts and all(parts)
        lengths = [len(example) for part in parts for example in part]
        assert lengths == sorted(lengths)
        assert sum(lengths) >= batches.tokens_per_step
        assert sum(lengths) - 256 < batches.tokens_per_step


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.data())
def test_cutting_keeps_order_and_leaves_no_part_empty(lengths, data):
    parts = data.draw(st.integers(1, len(lengths)))
    examples = [Example([0] * (n - 1), [1]) for n in sorted(lengths)]
    runs = _cut(examples, parts, sum(lengths))
    assert len(runs) == parts and all(runs)
    assert [example for run in runs for example in run] == examples
    even = sum(lengths) / parts
    assert max(sum(map(len, run)) for run in runs) <= even + 2 * max(lengths)


def test_shares_of_sources_are_close_to_their_weights(encoder):
    fixed = {"sums": numbered(40), "takes": numbered(40, "Take one from {}.")}
    batches = mixture(
        encoder, {"words": 1.0, "sums": 2.0, "takes": 1.0, "none": 0.0}, fixed,
        tokens_per_step=60_000,
    )  # fmt: skip
    texts = [
        encoder.tokenizer.decode(example.prompt) for part in batches.pool(0) for example in part
    ]
    share = sum("Add one" in text for text in texts) / len(texts)
    assert len(texts) > 800 and abs(share - 0.5) < 0.06


@given(st.floats(0.05, 1.0))
def test_the_curriculum_rises_from_two_steps_to_all(full_at):
    most = [curriculum_steps(i / 50, full_at=full_at) for i in range(51)]
    assert most == sorted(most)
    assert most[0] == 2 and most[-1] == MAX_STEPS


def test_the_curriculum_keeps_long_problems_for_later(encoder):
    batches = mixture(encoder, curriculum=0.5, tokens_per_step=3000)

    def most_steps(pool):
        texts = (encoder.tokenizer.decode(e.answer) for part in pool for e in part)
        return max(text.count(" = ") for text in texts)

    assert most_steps(batches.pool(0)) == 2
    assert most_steps(batches.pool(5)) == MAX_STEPS


@pytest.mark.parametrize("source", ["sums", "words"])
def test_a_source_with_nothing_short_enough_is_an_error(tokenizer, source):
    short = Encoder(tokenizer, max_tokens=4)
    with pytest.raises(DeliberateError, match=f"'{source}' fits data.max_tokens=4"):
        mixture(short, {source: 1.0}, {"sums": numbered(5)})[0]


def test_problems_that_are_too_long_are_left_out(encoder):
    short = Encoder(encoder.tokenizer, max_tokens=60)
    parts = mixture(short).pool(0)
    assert max(len(example) for part in parts for example in part) <= 60


@pytest.mark.parametrize("weights", [{"words": 0.0}, {"words": -1.0}, {"words": 1.0, "sums": -1.0}])
def test_a_mixture_without_sense_is_an_error(encoder, weights):
    with pytest.raises(DeliberateError, match=r"empty|negative"):
        mixture(encoder, weights, {"sums": numbered(5)})


def test_collating_keeps_the_order_of_rows():
    rows = [Example([5, 6], [7]), Example([5], [8, 9, 10])]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 8, 9, 10]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_problem_without_a_solution_is_taught_by_its_answer(encoder):
    example = encoder.example(Problem("1", "How many?", "42"))
    assert encoder.tokenizer.decode(example.answer) == f" #### 42{encoder.tokenizer.eos_token}"


def test_a_tokenizer_without_an_end_is_refused():
    class Endless:
        eos_token_id = None

    with pytest.raises(DeliberateError, match="end-of-text"):
        Encoder(Endless(), max_tokens=10)


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_loses_nothing_and_gives_every_digit_its_own_token(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    spelled = tokenizer.encode("x1234567890", add_special_tokens=False)
    assert spelled[-10:] == [digits[int(d)] for d in "1234567890"]


def test_training_a_tokenizer_twice_and_saving_it_give_the_same_ids(tokenizer, tmp_path):
    problems = list(word_problems("train", size=200, seed=9))
    texts = [f"{prompt_text(p.question)} {p.solution}" for p in problems]
    again = train_tokenizer(texts, 400)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert again.get_vocab() == loaded.get_vocab() == tokenizer.get_vocab()
    for text in texts[:50]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == loaded.encode(text) == ids
        assert ids[0] == loaded.bos_token_id and loaded.decode(ids[1:]) == text
