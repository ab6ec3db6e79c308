"""A draft layer in EAGLE-3's layout: the same drafts, read by `speculators` where it is there."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import VOCAB, random_ids, tiny_model
from torch.nn import functional as F

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.export import speculator
from deliberate.export.eagle3_layout import eagle3_outputs, eagle3_tensors, own_position_bias
from deliberate.export.speculator import export_speculator
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig, rotate
from deliberate.utils.errors import DeliberateError

DRAFTED = 50


def drafting(seed: int = 0, heads: tuple[int, int, int] = (4, 2, 8)) -> AdaptiveModel:
    """A tiny random model with a random draft layer over a part of the vocabulary."""
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2], executor="generic")
    config = DraftLayerConfig(
        model.backbone.hidden_size, *heads, 48, DRAFTED, eps=model.backbone.norm.variance_epsilon
    )
    torch.manual_seed(seed)
    layer = DraftLayer(config)
    with torch.no_grad():
        layer.vocabulary.copy_(torch.randperm(VOCAB)[:DRAFTED].sort().values)
        for gain in (layer.embedding_norm, layer.attention_norm, layer.mlp_norm):
            gain.add_(0.3 * torch.randn(gain.shape))
        model.backbone.norm.weight.add_(0.3 * torch.randn(model.backbone.norm.weight.shape))
    model.attach_draft(layer, DraftPrior())
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculator")
    drafting().save_pretrained(folder / "model", merge=True)
    made = export_speculator(str(folder / "model"), folder / "new" / "out", verifier="org/whole")
    return folder / "model", made


@torch.no_grad()
def drafts_by_hand(model: AdaptiveModel, ids: torch.Tensor, steps: int) -> list[list[int]]:
    """Tokens drafted after each position, `steps` deep, whose own tokens are those of `ids`."""
    backbone = model.backbone
    layer = DraftLayer(model.draft.layer.config)  # in float32
    layer.load_state_dict(model.draft.layer.state_dict())
    head = backbone.lm_head.weight[layer.vocabulary]
    states = model(input_ids=ids, output_exit_states=True).last[0]
    found = []
    for end in range(1, ids.shape[1] - steps):
        known, chain = states[:end], []
        for step in range(steps):
            tokens = ids[0, 1 : end + step + 1]
            joined = layer.join(backbone.embed_tokens(tokens), backbone.norm(known))[None]
            places = torch.arange(len(known))
            keys, values = layer.keys_values(joined, places)
            later = places > places[:, None]
            attended = layer.attend(layer.queries(joined, places), keys, values, later)
            output = layer.after_attention(joined, attended)[0, -1:]
            best = int(F.linear(backbone.norm(output), head).argmax())
            chain.append(int(layer.vocabulary[best]))
            known = torch.cat([known, output])
        found.append(chain)
    return found


@torch.no_grad()
@pytest.mark.parametrize("heads", [(4, 2, 8), (4, 4, 8), (6, 2, 16), (8, 1, 6)])
def test_two_layers_of_the_layout_give_the_outputs_of_the_draft_layer(heads):
    model = drafting(1, heads)
    layer, backbone = model.draft.layer, model.backbone
    config = speculator._config(model, layer, 512, "whole")["transformer_layer_config"]
    gain, head = speculator._norm_and_head(model, layer)
    embedding = backbone.embed_tokens(torch.arange(VOCAB))
    tensors = eagle3_tensors(layer, gain, head, embedding, positions=512)
    assert speculator._difference(model, layer, tensors, config) < 1e-4
    tensors["layers.0.self_attn.k_proj.bias"] *= 0.02  # attention that sees other positions too
    assert speculator._difference(model, layer, tensors, config) > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([16, 32, 64, 128]),
    st.floats(3, 6.5).map(lambda power: 10**power),
    st.sampled_from([16, 300, 3000]),
)
def test_a_position_attends_to_itself_at_every_distance(head_dim, theta, positions):
    try:
        bias = own_position_bias(head_dim, theta, positions)
    except DeliberateError:
        assert head_dim < 64  # few frequencies, far apart
        assume(False)
    places = torch.arange(positions, dtype=torch.float64)
    angles = places[:, None] / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.cat([angles, angles], -1)
    turned = rotate(bias.double().expand(1, 1, positions, -1), angles.cos(), angles.sin())[0, 0]
    products = turned @ turned[-1] / math.sqrt(head_dim)
    weights = products.softmax(0)
    assert float(weights[:-1].sum()) < 1e-7 * positions
    assert float(bias.max()) < 100  # what bfloat16 products can be told apart by


def test_the_folder_names_the_format_the_verifier_and_the_vocabulary(exported):
    folder, made = exported
    config = json.loads((made.path / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and config["norm_before_residual"]
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/whole",
        "architectures": ["LlamaForCausalLM"],
    }
    layer = AdaptiveModel.from_pretrained(folder).draft.layer
    tensors = load_file(made.path / "model.safetensors")
    drafted = torch.arange(DRAFTED) + tensors["d2t"]
    assert torch.equal(drafted, layer.vocabulary)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), layer.vocabulary)
    assert made.vocabulary == config["draft_vocab_size"] == DRAFTED and made.apart < 1e-4
    assert [one.name for one in made.path.parent.iterdir()] == ["out"]


@torch.no_grad()
def test_the_reader_of_speculators_drafts_what_the_draft_layer_drafts(exported, tmp_path):
    reader = pytest.importorskip("speculators", reason="speculators is not installed")
    folder, _ = exported
    made = export_speculator(str(folder), tmp_path / "out", verifier=str(folder))
    config = reader.SpeculatorModelConfig.from_pretrained(made.path)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = reader.SpeculatorModel.from_pretrained(made.path, config=config).eval()
    model = AdaptiveModel.from_pretrained(folder, executor="generic")
    ids, steps = random_ids(20, seed=3), 3
    last = model(input_ids=ids, output_exit_states=True).last[:, :-1]
    unread = torch.randn(1, last.shape[1], 2 * last.shape[2])
    found = theirs(
        hidden_states=torch.cat([unread, last], -1),
        input_ids=ids[:, 1:],
        document_ids=torch.zeros_like(ids[:, 1:]),
        ttt_steps=steps,
    )
    wanted = drafts_by_hand(model, ids, steps)
    for step, drafted in enumerate(found):
        tokens = (drafted + theirs.d2t[drafted])[0, : len(wanted)].tolist()
        assert tokens == [chain[step] for chain in wanted], step


@torch.no_grad()
def test_drafts_after_drafts_are_those_of_the_layer(exported):
    """The format's recursion by hand: an output takes the place of the next state."""
    folder, made = exported
    model = AdaptiveModel.from_pretrained(folder, executor="generic")
    tensors = load_file(made.path / "model.safetensors")
    config = json.loads((made.path / "config.json").read_text())["transformer_layer_config"]
    ids, steps = random_ids(12, seed=4), 3
    states = model(input_ids=ids, output_exit_states=True).last[0]
    found = []
    for end in range(1, ids.shape[1] - steps):
        known, chain = states[:end], []
        for step in range(steps):
            embedded = tensors["embed_tokens.weight"].float()[ids[0, 1 : end + step + 1]]
            output = eagle3_outputs(tensors, config, embedded, known)[-1:]
            normed = F.rms_norm(output, output.shape[-1:], tensors["norm.weight"].float(),
                                config["rms_norm_eps"])  # fmt: skip
            best = int(F.linear(normed, tensors["lm_head.weight"].float()).argmax())
            chain.append(best + int(tensors["d2t"][best]))
            known = torch.cat([known, output])
        found.append(chain)
    assert found == drafts_by_hand(model, ids, steps)


def test_what_the_layout_has_no_room_for_is_refused_by_name(exported, tmp_path, monkeypatch):
    folder, made = exported
    with pytest.raises(DeliberateError, match="exists: name a new folder"):
        export_speculator(str(folder), made.path, verifier="org/whole")
    with pytest.raises(DeliberateError, match="verifier is empty"):
        export_speculator("no/such-model", tmp_path / "out", verifier=" ")
    with pytest.raises(DeliberateError, match=r"has no draft layer.*deliberate export draft"):
        export_speculator("tiny", tmp_path / "out", verifier="org/whole")
    with pytest.raises(DeliberateError, match="must be 32 wide together"):
        narrow = drafting(0, (2, 2, 8))
        layer = narrow.draft.layer
        eagle3_tensors(layer, *speculator._norm_and_head(narrow, layer), torch.zeros(VOCAB, 32),
                       positions=64)  # fmt: skip
    with pytest.raises(DeliberateError, match="do not keep 4096 positions apart"):
        own_position_bias(2, 10000.0, 4096)
    biased = drafting()
    biased.base.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    with pytest.raises(DeliberateError, match="the model has a head with a bias"):
        speculator._norm_and_head(biased, biased.draft.layer)
    monkeypatch.setattr(speculator, "_difference", lambda *_: float("nan"))
    with pytest.raises(DeliberateError, match="gives other outputs than the draft layer"):
        export_speculator(str(folder), tmp_path / "out", verifier="org/whole")
    assert not list(tmp_path.iterdir())
