"""Problems and documents as training examples: chat templates, loss masks, packing, the dry run."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.data.problem import Problem
from deliberate.data.prompts import chat_wanted, use_chat
from deliberate.data.texts import Document
from deliberate.data.word_problems import word_problems
from deliberate.train.batches import Encoder, Example, MixtureBatches, Packed, collate, pack
from deliberate.train.dry_run import BOUNDARY, decoded_rows, show
from deliberate.train.objectives.pretrain import PretrainObjective
from deliberate.train.tokenizer import train_tokenizer
from deliberate.utils.errors import DeliberateError

PROBLEM = Problem("1", "How many? ", "42", "40 + 2 = 42\n#### 42")
# Marks of a turn like those of published chat models, the end of a turn being the end of text.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"{p.question}\n{p.solution}" for p in word_problems("train", size=100, seed=9)]
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def chatty(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = TEMPLATE
    return copied


def test_a_chat_template_marks_the_turns_and_the_loss_is_on_the_reply(chatty):
    encoder = Encoder(chatty, max_tokens=200, chat=True, system="Be brief.")
    example = encoder.example(PROBLEM)
    assert chatty.decode(example.prompt) == "<system>Be brief.\n<user>How many?\n<assistant>"
    assert chatty.decode(example.answer) == f"40 + 2 = 42\n#### 42{chatty.eos_token}\n"
    assert example.prompt == encoder.prompt(PROBLEM.question)
    assert example.prompt + example.answer == chatty.encode(
        chatty.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": PROBLEM.solution},
            ],
            tokenize=False,
        ),
        add_special_tokens=False,
    )


def test_a_template_is_used_where_there_is_one_unless_chat_is_false(tokenizer, chatty):
    assert use_chat("auto", chatty) and not use_chat("auto", tokenizer)
    assert not use_chat(False, chatty)
    with pytest.raises(DeliberateError, match="no chat template"):
        Encoder(tokenizer, max_tokens=200, chat=True)


def test_outside_training_too_a_template_is_used_where_there_is_one(tokenizer, chatty):
    assert chat_wanted("auto", chatty) and chat_wanted("always", chatty, system="Be brief.")
    assert not chat_wanted("never", chatty) and not chat_wanted("auto", tokenizer)
    with pytest.raises(DeliberateError, match="chat=always: the tokenizer has no chat template"):
        chat_wanted("always", tokenizer)
    with pytest.raises(DeliberateError, match="chat=sometimes is not one of auto, always, never"):
        chat_wanted("sometimes", chatty)
    with pytest.raises(DeliberateError, match=r"system=.* needs a chat template, and none is used"):
        chat_wanted("auto", tokenizer, system="Be brief.")


def test_the_form_of_a_prompt_is_the_text_around_the_question(tokenizer, chatty):
    for encoder in (
        Encoder(tokenizer, max_tokens=200),
        Encoder(chatty, max_tokens=200, chat=True, system="Be brief."),
    ):
        text = encoder.form.replace("{question}", "How many?")
        assert (
            encoder.tokenizer.decode(encoder.prompt("How many?")).removeprefix(
                tokenizer.bos_token or ""
            )
            == text
        )


def test_a_template_whose_prompt_is_no_prefix_of_its_conversation_is_refused(chatty):
    odd = copy.deepcopy(chatty)
    odd.chat_template = TEMPLATE.replace("<assistant>{% endif %}", "<think>{% endif %}")
    with pytest.raises(DeliberateError, match=r"data\.chat=false"):
        Encoder(odd, max_tokens=200, chat=True).example(PROBLEM)


def test_the_loss_may_be_taken_on_the_prompt_too(tokenizer):
    plain = Encoder(tokenizer, max_tokens=200).example(PROBLEM)
    whole = Encoder(tokenizer, max_tokens=200, loss_on="all").example(PROBLEM)
    assert whole.prompt == plain.prompt[:1]
    assert whole.prompt + whole.answer == plain.prompt + plain.answer
    with pytest.raises(DeliberateError, match="'prompt'"):
        Encoder(tokenizer, max_tokens=200, loss_on="prompt")


def test_a_long_document_is_cut_and_nothing_of_it_is_lost(tokenizer):
    encoder = Encoder(tokenizer, max_tokens=20)
    text = "One day a little girl found a needle in her room. " * 5
    parts = encoder.examples(Document(text))
    ids = [token for part in parts for token in part.prompt + part.answer]
    assert max(map(len, parts)) == 20 and all(len(part.prompt) == 1 for part in parts)
    expected = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert ids == expected[: len(ids)] and len(expected) - len(ids) <= 1
    exact = encoder.examples(Document("x", (5, 6, 7)))
    assert exact == [Example([tokenizer.bos_token_id], [5, 6, 7, tokenizer.eos_token_id])]


def test_text_that_the_tokenizer_does_not_know_is_refused():
    vocabulary = {word: number for number, word in enumerate(["?", "</s>", "a", "b"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    small = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="?")
    known, foreign = [Document("a b a b")] * 4, [Document("a b 7 8")] * 4

    def batches(documents):
        encoder = Encoder(small, max_tokens=16)
        settings = {"pools": 1, "parts": 1, "tokens_per_step": 20, "seed": 0}
        return MixtureBatches(encoder, {"text": documents}, {"text": 1.0}, **settings)

    assert batches(known)[0]["input_ids"].numel()
    with pytest.raises(DeliberateError, match=r"does not fit data source 'text': 40% .* unknown"):
        batches(foreign)


lengths = st.lists(st.integers(2, 30), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths, st.integers(30, 90))
def test_packing_loses_nothing_fills_no_row_over_and_wastes_little(sizes, capacity):
    examples = [Example([number], [number] * (size - 1)) for number, size in enumerate(sizes)]
    rows = pack(examples, capacity)
    kept = [example.prompt[0] for row in rows for example in row.examples]
    assert sorted(kept) == list(range(len(sizes)))
    assert all(len(row) <= capacity for row in rows)
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)
    assert len(rows) <= 1 + 2 * sum(sizes) / capacity
    assert pack(examples, capacity) == rows


def test_packed_rows_restart_positions_and_predict_nothing_across_a_boundary():
    row = Packed((Example([5], [6, 7]), Example([], [8, 9])))
    batch = collate([row, Example([1, 2], [3, 4, 5, 6])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]]
    assert batch["labels"].tolist() == [
        [-100, 6, 7, -100, 9, -100],
        [-100, -100, 3, 4, 5, 6],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]


def random_examples(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        ids = torch.randint(0, VOCAB, (size,), generator=generator).tolist()
        yield Example(ids[:3], ids[3:])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_examples_have_the_loss_of_each_alone(arch):
    """With sliding windows too: attention and positions do not cross a boundary."""
    model = AdaptiveModel(tiny_model(arch, layers=3), [1, 2])
    objective = PretrainObjective(model).eval()
    examples = list(random_examples(4, 13, 9, 17, 11))

    def sums(batch):
        batch.pop("attention_mask")
        with torch.no_grad():
            return objective(**batch).sums

    apart = [sums(collate([example], 0)) for example in examples]
    rows = pack(examples, 24)
    assert len(rows) < len(examples)
    together = sums(collate(rows, 0))
    assert together["tokens"] == sum(one["tokens"] for one in apart)
    for name in ("loss/exit1", "loss/exit2", "loss/exit3"):
        alone = sum(float(one[name]) for one in apart)
        assert float(together[name]) == pytest.approx(alone, rel=1e-5)


def test_packed_steps_are_full_rows_and_hang_on_the_index_alone(tokenizer):
    encoder = Encoder(tokenizer, max_tokens=128)
    settings = {"pools": 3, "parts": 2, "tokens_per_step": 3000, "seed": 1, "packing": True}
    batches = MixtureBatches(encoder, {}, {"words": 1.0}, **settings)
    step = [batches[index] for index in range(2)]
    used = sum(int(batch["attention_mask"].sum()) for batch in step)
    assert used >= 3000 and used / sum(b["input_ids"].numel() for b in step) > 0.85
    again = MixtureBatches(encoder, {}, {"words": 1.0}, **settings)
    assert torch.equal(again[5]["input_ids"], batches[5]["input_ids"])
    with pytest.raises(DeliberateError, match="cannot fill 2 micro-batches"):
        MixtureBatches(encoder, {}, {"words": 1.0}, **(settings | {"tokens_per_step": 200}))


def test_decoding_a_batch_marks_what_the_loss_is_on(tokenizer):
    encoder = Encoder(tokenizer, max_tokens=200)
    example = encoder.example(PROBLEM)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    shown = f"{bos}Question: How many?\nAnswer:⟦ 40 + 2 = 42\n#### 42{eos}⟧"
    assert list(decoded_rows(collate([example], 0), tokenizer)) == [shown]
    packed = collate([Packed((example, example))], 0)
    assert list(decoded_rows(packed, tokenizer)) == [shown + BOUNDARY + shown]
    # Every token with a label lies between the marks, and no other.
    text = "".join(part.split("⟧")[0] for part in shown.split("⟦")[1:])
    labels = collate([example], 0)["labels"]
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == text


def test_showing_a_step_counts_its_tokens(tokenizer, capsys):
    encoder = Encoder(tokenizer, max_tokens=128)
    batches = MixtureBatches(
        encoder, {}, {"words": 1.0}, pools=1, parts=2, tokens_per_step=600, seed=1
    )
    show(batches, tokenizer, rows=1)
    out = capsys.readouterr().out
    tokens = sum(int(batches[i]["attention_mask"].sum()) for i in range(2))
    assert f"{tokens} tokens" in out and "⟦" in out and out.count("=== row") == 1
