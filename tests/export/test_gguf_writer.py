"""GGUF files that are written: read back by transformers, by our kernels and by llama.cpp."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api import checkpoint
from deliberate.api.gguf import load_gguf, load_gguf_tokenizer
from deliberate.api.gguf_blocks import PAIRED_ROWS
from deliberate.data.word_problems import word_problems
from deliberate.export.draft import export_draft
from deliberate.export.gguf_writer import write_gguf
from deliberate.utils.errors import DeliberateError

pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


@pytest.fixture(scope="module")
def texts():
    return [problem.question for problem in word_problems("test", size=12, seed=4)]


@torch.no_grad()
@pytest.mark.parametrize("arch", list(PAIRED_ROWS))
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_is_read_back_is_the_one_that_was_written(arch, tied, tmp_path, tokenizer):
    overrides = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}.get(arch, {})
    model = tiny_model(
        arch,
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        **overrides,
    )
    path = tmp_path / "model.gguf"
    name = "a mistral" if arch == "mistral" else ""
    write_gguf(model, tokenizer, path, dtype="f32", name=name)
    ids = random_ids(10, seed=2)
    found = load_gguf(path, dtype="float32")
    torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_tokenizer_that_is_read_back_cuts_text_in_the_same_way(tmp_path, tokenizer, texts):
    path = tmp_path / "model.gguf"
    model = tiny_model("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    write_gguf(model, tokenizer, path)
    read = load_gguf_tokenizer(path)
    # transformers' reader does not know about single digits; the words it cuts alike.
    words = ["".join(letter for letter in text if not letter.isdigit()) for text in texts]
    assert [read.encode(text) for text in words] == [tokenizer.encode(text) for text in words]
    assert read.eos_token_id == tokenizer.eos_token_id


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "apart"), [("f32", 1e-4), ("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.2)]
)
def test_an_exported_exit_has_its_logits_in_every_dtype(tmp_path, dtype, apart):
    plain = export_draft("tiny", tmp_path / "plain", layer=4)
    packed = export_draft("tiny", tmp_path / "draft.gguf", layer=4, dtype=dtype)
    ids = random_ids(24, seed=5)
    expected = checkpoint.load_base(str(plain.path))(input_ids=ids).logits
    found = load_gguf(packed.path, dtype="float32")(input_ids=ids).logits
    assert float((found - expected).abs().max()) < apart
    if dtype != "f32":
        assert packed.megabytes < 0.6 * plain.megabytes


def test_llama_cpp_reads_it_and_cuts_text_as_the_tokenizer(tmp_path, tokenizer, texts):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    made = export_draft("tiny", tmp_path / "draft.gguf", dtype="f32")
    shallow = checkpoint.load_base(str(export_draft("tiny", tmp_path / "plain").path))
    engine = llama_cpp.Llama(str(made.path), n_ctx=256, logits_all=True, verbose=False)
    try:
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert engine.tokenize(text.encode(), add_bos=False) == ids
            engine.reset()
            engine.eval(ids)
            found = torch.tensor(engine.scores[: len(ids)])
            with torch.no_grad():
                expected = shallow(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.0)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("arch", "overrides", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window 8 is not written as GGUF"),
        ("gemma2", {}, "'gemma2' is not written as GGUF: llama, mistral"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'linear' is not written as GGUF",
        ),
    ],
)
def test_a_model_that_the_file_cannot_hold_is_refused_by_name(
    arch, overrides, message, tmp_path, tokenizer
):
    model = tiny_model(arch, dtype=torch.float32, vocab_size=len(tokenizer), **overrides)
    with pytest.raises(DeliberateError, match=message):
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_names_those_that_are_written(tmp_path):
    with pytest.raises(DeliberateError, match="dtype 'f17' is not one of f32, f16, bf16, q8_0"):
        export_draft("tiny", tmp_path / "draft.gguf", dtype="f17")


def test_a_way_to_cut_text_without_a_name_asks_for_one(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
    )
    other = PreTrainedTokenizerFast(tokenizer_object=raw)
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(DeliberateError, match=r"Whitespace, ByteLevel.*--pre NAME"):
        write_gguf(model, other, tmp_path / "model.gguf")
    write_gguf(model, other, tmp_path / "model.gguf", pre="gpt-2")
    assert (tmp_path / "model.gguf").stat().st_size > 1000
