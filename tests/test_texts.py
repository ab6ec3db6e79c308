"""Plain text, own files, and the text that a model writes itself."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate import storage
from deliberate.errors import DeliberateError
from deliberate.train.selfdata import (
    SelfDataConfig,
    choose,
    generate_texts,
    own_documents,
    read_texts,
    write_texts,
)
from deliberate.train.texts import HELD_OUT, Document, load_file, load_texts, text_split


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
        ({"text": "story"}, "no column 'story': it has a, body, q"),
        ({"question": "q", "answer": "reply"}, "no column 'reply'"),
        ({"question": "q", "answer": "a", "solution": "steps"}, "no column 'steps'"),
        ({"question": "q"}, "text, or those of question and answer"),
        ({"columns": "q"}, r"unknown setting data\.files\.mine\.columns"),
        ({"text": "body", "path": None}, "either path"),
        ({"text": "body", "hub": "owner/name"}, "either path"),
        ({"text": "body", "path": "/no/such.jsonl"}, "/no/such.jsonl does not exist"),
    ],
)
def test_a_file_without_the_named_columns_is_one_line(tmp_path, settings, named):
    path = write_lines(tmp_path / "mine.jsonl", {"body": "Once.", "q": "How many?", "a": "4"})
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "random")
    return folder, storage.load_base(str(folder)), storage.load_tokenizer(folder)


def test_greedy_text_is_what_the_model_says_after_its_sampled_beginning(checkpoint):
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


def test_sampled_text_hangs_on_its_seed(checkpoint):
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
    make = {"source": str(folder), "seed": 4, "patience": 0.1}
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


def test_a_model_that_says_nothing_cannot_make_its_own_data(checkpoint, tmp_path):
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

    with pytest.raises(DeliberateError, match="ended every text"):
        write_texts(tmp_path / "x", Silent(), tokenizer, SelfDataConfig(count=2), seed=0)
    assert not (tmp_path / "x").exists()
