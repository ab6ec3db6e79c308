"""Plain text, user files, and text that a model generates itself."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_base, load_tokenizer
from deliberate.data.prompts import Encoder
from deliberate.data.self_generated import (
    SelfDataConfig,
    choose,
    generate_answers,
    generate_texts,
    own_documents,
    read_texts,
    write_texts,
)
from deliberate.data.texts import HELD_OUT, Document, load_file, load_texts, text_split
from deliberate.train import setup
from deliberate.train.checks import check_config
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def stories(tmp_path):
    write_lines(tmp_path / "text" / "b.jsonl", *({"text": f"second {n}"} for n in range(100)))
    write_lines(tmp_path / "text" / "a.jsonl", *({"text": f"first {n}"} for n in range(100)))
    return tmp_path


def test_texts_are_split_by_a_hash_that_keeps_a_tenth_out(stories):
    train, test = (load_texts(split=side, data_dir=stories) for side in ("train", "test"))
    assert len(train) + len(test) == 200 and {d.text for d in train}.isdisjoint(test)
    assert 200 / HELD_OUT / 2 < len(test) < 200 / HELD_OUT * 2
    assert [d.text.split()[0] for d in train] == sorted(d.text.split()[0] for d in train)
    assert text_split(" first 1\n") == text_split("first 1")


def test_one_file_of_texts_may_be_named_and_a_wrong_name_is_answered(stories):
    assert {d.text.split()[0] for d in load_texts("text/b", data_dir=stories)} == {"second"}
    assert len(load_texts(data_dir=stories, limit=3)) == 3
    with pytest.raises(DeliberateError, match="there is a, b"):
        load_texts("text/c", data_dir=stories)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"text": "story"}, "no column 'story': it has a, body, ids, q, start"),
        ({"question": "q", "answer": "reply"}, "no column 'reply'"),
        ({"question": "q", "answer": "a", "solution": "steps"}, "no column 'steps'"),
        ({"question": "q"}, "tokens, or those of question and answer"),
        ({"columns": "q"}, r"unknown setting data\.files\.mine\.columns"),
        ({"tokens": "body"}, "no list of token ids in 'body': it has a, body, ids, q, start"),
        ({"tokens": "ids", "prompt": "q"}, "q='How many\\?' must be how many of its 3 tokens"),
        ({"tokens": "ids", "prompt": "start"}, "start=3 must be how many of its 3 tokens"),
        ({"tokens": "ids", "text": "body"}, "text and of tokens: name one"),
        ({"text": "body", "prompt": "start"}, "prompt counts tokens"),
        ({"text": "body", "path": None}, "either path"),
        ({"text": "body", "hub": "owner/name"}, "either path"),
        ({"text": "body", "path": "/no/such.jsonl"}, "/no/such.jsonl does not exist"),
    ],
)
def test_a_file_without_the_named_columns_is_one_line(tmp_path, settings, named):
    row = {"body": "Once.", "q": "How many?", "a": "4", "ids": [5, 6, 7], "start": 3}
    path = write_lines(tmp_path / "mine.jsonl", row)
    with pytest.raises(DeliberateError, match=named) as error:
        load_file("mine", {"path": str(path), **settings})
    assert "\n" not in str(error.value)


def test_own_files_are_read_by_the_names_of_their_columns(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", {"body": "Once.", "q": "How many?", "a": "4"})
    assert load_file("mine", {"path": str(path), "text": "body"}) == [Document("Once.")]
    (problem,) = load_file("mine", {"path": str(path), "question": "q", "answer": "a"})
    assert (problem.question, problem.answer, problem.solution) == ("How many?", "4", "4")
    (problem,) = load_file(
        "mine", {"path": str(path), "question": "q", "answer": "a", "solution": "body"}
    )
    assert problem.solution == "Once."


def test_files_of_token_ids_are_read_as_they_are_with_their_prompt(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", {"tokens": [5, 6, 7], "prompt": 1, "index": 0})
    settings = {"path": str(path), "tokens": "tokens"}
    assert load_file("own", settings) == [Document("", (5, 6, 7))]
    settings["prompt"] = "prompt"
    assert load_file("own", settings) == [Document("", (5, 6, 7), 1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "random")
    return folder, load_base(str(folder)), load_tokenizer(folder)


def test_greedy_text_is_what_the_model_predicts_after_its_sampled_beginning(checkpoint):
    _, model, tokenizer = checkpoint
    config = SelfDataConfig(count=5, max_tokens=24, temperature=0.0, sampled_prefix=3, batch_size=2)
    texts = [ids for _, ids in generate_texts(model, tokenizer, config, seed=1)]
    assert len(texts) == 5 and len({tuple(ids[:3]) for ids in texts}) > 1
    for ids in texts:
        whole = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            best = model(whole).logits[0].argmax(-1).tolist()
        assert len(ids) == 23 or best[-1] == tokenizer.eos_token_id
        assert ids[3:] == best[3 : len(ids)]


def test_sampled_text_depends_on_its_seed(checkpoint):
    _, model, tokenizer = checkpoint
    config = SelfDataConfig(count=4, max_tokens=12, top_p=0.9)

    def made(seed):
        return list(generate_texts(model, tokenizer, config, seed=seed))

    assert made(1) == made(1) != made(2)


def test_nucleus_sampling_draws_from_the_least_mass_that_suffices():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits, temperature=1.0, top_p=0.7, generator=generator)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    only = choose(logits[:50], temperature=1.0, top_p=1e-9, generator=generator)
    assert set(only.tolist()) == {0} == set(choose(logits, temperature=0, top_p=1,
                                                   generator=generator).tolist())  # fmt: skip


def test_own_text_is_written_once_and_found_again(checkpoint, tmp_path, capsys):
    folder, model, tokenizer = checkpoint
    config = SelfDataConfig(count=3, max_tokens=10)
    make = {"source": str(folder), "seed": 4, "timeout": 0.1}
    with pytest.raises(DeliberateError, match="was not written"):
        own_documents(tmp_path, model, tokenizer, config, writes=False, **make)
    documents = own_documents(tmp_path, model, tokenizer, config, writes=True, **make)
    (path,) = tmp_path.glob("self-*.jsonl")
    assert read_texts(path) == documents and len(documents) == 3
    stamp = path.stat().st_mtime_ns
    assert own_documents(tmp_path, model, tokenizer, config, writes=False, **make) == documents
    assert path.stat().st_mtime_ns == stamp
    row = json.loads(path.read_text().splitlines()[0])
    assert tokenizer.decode(row["tokens"]) == row["text"]
    own_documents(tmp_path, model, tokenizer, config, writes=True, **(make | {"seed": 5}))
    assert len(list(tmp_path.glob("self-*.jsonl"))) == 2


def test_a_file_of_own_text_without_tokens_is_named(tmp_path):
    path = write_lines(tmp_path / "self.jsonl", {"text": "Once."})
    with pytest.raises(DeliberateError, match="'tokens'"):
        read_texts(path)


@pytest.mark.parametrize("change", [{"count": 0}, {"max_tokens": 1}, {"temperature": -1},
                                    {"top_p": 0.0}, {"batch_size": 0}])  # fmt: skip
def test_impossible_settings_of_own_text_are_named(change):
    with pytest.raises(DeliberateError, match=next(iter(change))):
        SelfDataConfig(**change)


def test_a_model_that_generates_nothing_cannot_make_its_own_data(checkpoint, tmp_path):
    tokenizer = checkpoint[2]

    class Silent:
        training, device = False, torch.device("cpu")

        def eval(self):
            return self

        def train(self, mode):
            return self

        def __call__(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 10)
            logits[..., tokenizer.eos_token_id] = 1e9
            return type("Out", (), {"logits": logits, "past_key_values": None})

    with pytest.raises(DeliberateError, match="only empty texts"):
        write_texts(tmp_path / "x", Silent(), tokenizer, SelfDataConfig(count=2), seed=0)
    assert not (tmp_path / "x").exists()


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_answers_continue_questions_of_any_length_as_the_model_does_alone(checkpoint):
    _, model, tokenizer = checkpoint
    config = SelfDataConfig(max_tokens=40, temperature=0.0, batch_size=3)
    encoder = Encoder(tokenizer, max_tokens=200)
    questions = ["How many?", "Mia has 3 plums. How many has she?", "2 + 2 = ?", "What?"]
    prompts = [encoder.prompt(question) for question in questions]
    assert len(set(map(len, prompts))) > 2
    answers = list(generate_answers(model, prompts, tokenizer, config, seed=0))
    assert sorted(ids[:length] for ids, length in answers) == sorted(prompts)
    for ids, length in answers:
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert ids[length:] == best[length - 1 : len(ids) - 1]
        assert tokenizer.eos_token_id not in ids[length:-1]
        assert len(ids) == 40 or ids[-1] == tokenizer.eos_token_id


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """The checkpoint with a chat template, and a data folder with one train split."""
    folder = shutil.copytree(checkpoint[0], tmp_path / "chat")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    rows = [
        {"question": f"What is {n} plus 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(9)
    ]
    write_lines(tmp_path / "data" / "gsm8k" / "train.jsonl", *rows)
    return folder, tmp_path / "data"


def own_text(folder, data, out, *overrides):
    cfg = compose("train", [
        "recipe=heads", "model=folder", f"model.path='{folder}'", "data=self", f"data.dir='{data}'",
        "data.self.count=6", "data.self.max_tokens=100", "data.max_tokens=160",
        f"output_dir='{out}'", *overrides,
    ])  # fmt: skip
    check_config(cfg)
    problems = setup.training_problems(cfg)
    model, tokenizer = setup.build_model(cfg, problems)
    setup.add_own_text(cfg, problems, model, tokenizer, out)
    return problems["self"], setup.build_encoder(cfg, tokenizer), tokenizer


def test_a_chat_model_answers_train_questions_through_its_template(chatting, tmp_path):
    documents, encoder, tokenizer = own_text(*chatting, tmp_path / "run")
    asked = [tokenizer.decode(d.tokens[: d.prompt]) for d in documents]
    assert len(set(asked)) == 6
    assert all(re.search(r"<user> ?What is \d plus 1\?\n<assistant>$", text) for text in asked)
    for document in documents:
        (example,) = encoder.examples(document)
        assert (example.prompt, example.answer) == (
            list(document.tokens[: document.prompt]), list(document.tokens[document.prompt :])
        )  # fmt: skip
    (path,) = (tmp_path / "run").glob("self-*.jsonl")
    assert read_texts(path) == documents
    # The same questions are found again, others are not.
    own_text(*chatting, tmp_path / "run")
    own_text(*chatting, tmp_path / "run", "data.self.questions=[words]", "data.self.max_tokens=160")
    assert len(list((tmp_path / "run").glob("self-*.jsonl"))) == 2


def test_without_a_template_or_questions_a_model_writes_freely(chatting, checkpoint, tmp_path):
    for folder, more in ((checkpoint[0], []), (chatting[0], ["data.self.questions=none"])):
        out = tmp_path / str(len(more))
        documents, _, _ = own_text(folder, chatting[1], out, *more)
        assert not any(document.prompt for document in documents)


@pytest.mark.parametrize(
    ("setting", "named"),
    [("gsm8k", "a list of sources"), ("[math500]", "test split"), ("[gsm9k]", "'gsm9k'"),
     ("[]", "a list of sources"), ("[gsm_symbolic]", "evaluation only")],
)  # fmt: skip
def test_question_sources_that_cannot_be_used_are_named(chatting, tmp_path, setting, named):
    with pytest.raises(DeliberateError, match=named):
        own_text(*chatting, tmp_path / "run", f"data.self.questions={setting}")


def test_questions_that_leave_no_room_for_an_answer_are_named(chatting, tmp_path):
    with pytest.raises(DeliberateError, match=r"at most 4 tokens, half of data\.self\.max_tokens"):
        own_text(*chatting, tmp_path / "run", "data.self.max_tokens=8")
