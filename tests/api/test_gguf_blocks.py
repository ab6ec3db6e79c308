"""GGUF files whose matrices stay where they are."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM

from deliberate.api.gguf_file import GgufFile
from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.kernels import native_build
from deliberate.kernels.blocks import BlockFormat
from deliberate.modeling.block_modules import BlockEmbedding, BlockLinear, weight_count
from deliberate.utils.errors import DeliberateError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_files import write_gguf  # noqa: E402  (needs it)

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "initializer_range": 0.05}
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"head_dim": 64}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 128}),
}
ALL = {"": BlockFormat.Q4_1}
# As in a file of llama.cpp's "Q4_K_M", and all the others.
MIXED = {
    **{"": BlockFormat.Q4_K, "attn_v": BlockFormat.Q6_K, "ffn_down": BlockFormat.Q6_K},
    **{"token_embd": BlockFormat.Q8_0, "attn_output": BlockFormat.Q4_0, "output": BlockFormat.Q8_0},
}


def written(tmp_path, name: str = "llama", formats=None, **overrides):
    kind, settings = FAMILIES[name]
    model = tiny_model(kind, layers=3, dtype=torch.float32, **(SIZES | settings | overrides))
    return write_gguf(model, tmp_path / "model.gguf", formats or ALL)


def by_transformers(path):
    """As transformers' own reader loads a file."""
    name = {"gguf_file": path.name, "dtype": "float32"}
    return AutoModelForCausalLM.from_pretrained(path.parent, **name).eval()


@pytest.mark.parametrize("formats", [ALL, MIXED], ids=["q4_1", "mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_are_those_that_transformers_dequantises(name, formats, tmp_path):
    path = written(tmp_path, name, formats)
    model = AdaptiveModel.from_pretrained(path, weights="file", exits=[1, 2])
    ours, theirs = model.base, by_transformers(path)
    mine, other = ours.config.to_dict(), theirs.config.to_dict()
    assert {k for k, v in mine.items() if v != other.get(k)} <= {"_name_or_path"}
    parameters, in_blocks = dict(theirs.named_parameters(remove_duplicate=False)), 0
    for prefix, module in ours.named_modules():
        if isinstance(module, BlockLinear | BlockEmbedding):
            in_blocks += 1
            assert torch.equal(module.blocks.widen(), parameters.pop(f"{prefix}.weight"))
    own = dict(ours.named_parameters())
    assert in_blocks == 3 * 7 + 2 and set(parameters) == set(own)
    assert all(torch.equal(value, parameters[key]) for key, value in own.items())
    assert weight_count(ours) == weight_count(theirs) == theirs.num_parameters()
    assert model.trainable_parameters()[1] >= theirs.num_parameters()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_widened_to_the_model_that_transformers_makes_of_it(name, tmp_path):
    path = written(tmp_path, name, MIXED)
    ours = AdaptiveModel.from_pretrained(path, executor="generic").base
    theirs = by_transformers(path)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(other)
    assert all(mine[key].equal(other[key]) for key in mine)
    assert all(one.requires_grad for one in mine.values()) and not ours.training
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    ours.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(again[key].equal(value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_its_file_says_what_the_dequantised_one_says(name, tmp_path):
    path, ids = written(tmp_path, name), random_ids(30)
    ours = AdaptiveModel.from_pretrained(path, weights="file", exits=[1, 2])
    theirs = AdaptiveModel.from_pretrained(path, executor="generic")
    with torch.no_grad():
        wanted = theirs(ids).logits
        made = ours(ids).logits
    # Activations are rounded to 8 bits at every product.
    assert (made - wanted).std() < 0.03 * wanted.std()
    backbone = ours.backbone
    with torch.inference_mode():
        ctx = backbone.context(0, 30, device="cpu")
        hidden = backbone.run_layers(backbone.embed(ids, ctx), 0, 3, ctx, backbone.new_cache(30))
        # The same roundings, but for numbers on which another order of sums decides.
        assert (backbone.logits(hidden) - made).std() < 0.01 * made.std()


@pytest.mark.parametrize("batch", [1, 3])
def test_exits_and_drafts_over_a_file_give_what_dense_gives(batch, tmp_path):
    model = AdaptiveModel.from_pretrained(written(tmp_path), weights="file", exits=[1, 2])
    assert model.executor.startswith("fused")
    ids = random_ids(8, batch=batch)
    how = {"max_new_tokens": 24, "online": False}
    dense = model.generate(ids, fidelity="dense", **how)
    assert torch.equal(model.generate(ids, fidelity="exact", thresholds=0.03, **how), dense)
    assert torch.equal(model.generate(ids, fidelity="exact"), model.generate(ids, fidelity="dense"))


def test_an_engine_over_a_file_gives_what_generate_gives(tmp_path):
    model = AdaptiveModel.from_pretrained(written(tmp_path), weights="file", exits=[1, 2])
    engine, wanted = model.engine(max_running=2), {}
    for place, fidelity in enumerate(("dense", "exact", "dense")):
        ids = random_ids(6 + place)
        how = {"max_new_tokens": 12, "fidelity": fidelity, "eos_token_id": None}
        spec = DecodingSpec(fidelity=Fidelity(fidelity))
        number = engine.add(Request(ids[0], 12, spec=spec, end_tokens=()))
        wanted[number] = model.generate(ids, **how)[0, ids.shape[1] :].tolist()
    made: dict[int, list[int]] = {number: [] for number in wanted}
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    assert made == wanted


def test_exits_of_a_model_in_its_file_are_trained_through_its_head(tmp_path):
    model = AdaptiveModel.from_pretrained(written(tmp_path), weights="file", exits=[1])
    states = model(random_ids(6), output_exit_states=True).exits[0].detach()
    normed = model.backbone.norm(states)
    made = model.backbone.lm_head(model.exits.translate(0, normed))
    made.logsumexp(-1).sum().backward()
    gradients = [one.grad for one in model.exits.parameters() if one.grad is not None]
    assert gradients and any(bool(one.any()) for one in gradients)


def test_exits_over_a_file_are_saved_and_found_again_and_the_base_is_not_copied(tmp_path):
    path = written(tmp_path)
    model = AdaptiveModel.from_pretrained(path, weights="file", exits=[1])
    model.save_pretrained(tmp_path / "exits")
    again = AdaptiveModel.from_pretrained(tmp_path / "exits", weights="file")
    assert again.exit_config.layers == (1,)
    assert again.fingerprints() == model.fingerprints()
    with pytest.raises(DeliberateError, match="save without merge=True"):
        model.save_pretrained(tmp_path / "whole", merge=True)


WRONG = {
    "a type that is not read": (
        {"": BlockFormat.Q4_1},
        {},
        "is of type Q5_0: the C\\+\\+ kernels read",
    ),
    "floats": ({"": None}, {}, "holds no blocks: load it without"),
    "queries in floats": ({"": BlockFormat.Q4_1, "attn_q": None}, {}, "parts of a layer in blocks"),
    "another dtype": ({"": BlockFormat.Q4_1}, {"dtype": torch.bfloat16}, "states are float32"),
    "an argument": (
        {"": BlockFormat.Q4_1},
        {"device_map": "auto"},
        "device_map='auto' with weights",
    ),
    "another executor": (
        {"": BlockFormat.Q4_1},
        {"executor": "generic"},
        "need the fused executor",
    ),
    "another engine": ({"": BlockFormat.Q4_1}, {"engine": "eager"}, "C\\+\\+ kernels alone"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_file_cannot_do_is_refused_in_one_line(name, tmp_path):
    formats, arguments, said = WRONG[name]
    path = written(tmp_path, formats=formats)
    if name == "a type that is not read":
        content = path.read_bytes()
        # The type follows name, number of dimensions, and two sizes.
        at = content.index(b"blk.1.attn_q.weight") + len("blk.1.attn_q.weight") + 4 + 16
        path.write_bytes(content[:at] + struct.pack("<I", 6) + content[at + 4 :])
    with pytest.raises(DeliberateError, match=said) as refused:
        AdaptiveModel.from_pretrained(path, weights="file", **arguments)
    assert "\n" not in str(refused.value)


def test_weights_in_memory_and_in_a_file_are_not_taken_for_each_other(tmp_path):
    with pytest.raises(DeliberateError, match="weights='file' needs a GGUF file"):
        AdaptiveModel.from_pretrained("tiny", weights="file")
    with pytest.raises(DeliberateError, match="the model is in memory"):
        AdaptiveModel(tiny_model("llama", dtype=torch.float32), weights="file")
    base = AdaptiveModel.from_pretrained(written(tmp_path), weights="file").base
    assert AdaptiveModel(base).backbone.plan.in_blocks
    with pytest.raises(DeliberateError, match="its weights stay in a GGUF file; leave weights out"):
        AdaptiveModel(base, weights="int8")


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_one_line(share, tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DeliberateError) as refused:
        AdaptiveModel.from_pretrained(path, weights="file")
    assert "\n" not in str(refused.value) and "model.gguf" in str(refused.value)


def test_metadata_and_tensors_are_those_that_the_package_gguf_reads(tmp_path):
    path = written(tmp_path, "qwen2", MIXED)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert set(ours.tensors) == {one.name for one in theirs.tensors}
    for one in theirs.tensors:
        mine = ours.tensors[one.name]
        assert mine.kind == one.tensor_type and mine.shape == tuple(reversed(one.shape.tolist()))
        assert mine.data.numpy().tobytes() == one.data.tobytes()
    for key, value in ours.metadata.items():
        if key != "tokenizer.ggml.tokens":
            assert theirs.fields[key].contents() == value
    assert ours.metadata["tokenizer.ggml.tokens"] == len(
        theirs.fields["tokenizer.ggml.tokens"].data
    )


MEASURE = """
import sys, torch
from deliberate.api.model import AdaptiveModel
def field(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
small, large, weights = sys.argv[1:]
ids = torch.arange(40)[None] % 90
AdaptiveModel.from_pretrained(small, weights=weights).generate(ids, max_new_tokens=4)
open("/proc/self/clear_refs", "w").write("5")
before = field("VmRSS")
model = AdaptiveModel.from_pretrained(large, weights=weights)
model.generate(ids, max_new_tokens=4, fidelity="dense")
print(field("VmHWM") - before)
"""


@pytest.mark.parametrize(("weights", "bytes_a_weight"), [("file", 18 / 32), ("float", 4)])
def test_peak_memory_is_the_weights_and_a_little(weights, bytes_a_weight, tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory cannot be reset here")
    small = written(tmp_path).rename(tmp_path / "small.gguf")
    wide = {"hidden_size": 768, "intermediate_size": 4096, "vocab_size": 8000}
    large = written(tmp_path, formats={"": BlockFormat.Q4_0}, **wide)
    command = [sys.executable, "-c", MEASURE, small, large, weights]
    size = large.stat().st_size
    # The system takes back pages of code whenever it likes, and those that are read again count as
    # growth: of a few processes the least is what the model needs.
    grown = math.inf
    for _ in range(4):
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        grown = min(grown, int(ran.stdout.split()[-1]))
        if grown < 1.15 * size / (18 / 32) * bytes_a_weight + 4e6:
            break
    assert size > 20e6 and grown < 1.15 * size / (18 / 32) * bytes_a_weight + 4e6
