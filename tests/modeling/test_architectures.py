"""An architecture without an entry is run by convention, if it passes the probe; else refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deliberate.api.model import AdaptiveModel
from deliberate.eval import architectures as survey
from deliberate.modeling import probe as probing
from deliberate.modeling.architectures import ARCHITECTURES, by_convention
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

BY_CONVENTION = (
    "cohere2",  # scaled logits, layers without rotary, parallel blocks
    "deepseek_v2",  # latent attention, complex rotary table
    "deepseek_v3",
    "ernie4_5",
    "gemma3_text",  # two rotary tables, window pattern
    "glm4",
    "gpt_oss",  # attention sinks, experts
    "granite",  # scaled embeddings and logits
    "olmo3",
    "smollm3",  # layers without rotary
    "starcoder2",  # one window
)


@pytest.mark.parametrize("name", BY_CONVENTION)
def test_a_model_without_an_entry_decodes_as_transformers_does(name) -> None:
    assert name not in ARCHITECTURES
    base = survey.tiny(name)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the second prompt is shorter
    given = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False, "eos_token_id": None}
    plain = base.generate(ids, max_new_tokens=14, **given)
    model = AdaptiveModel(base, [1, 2])
    assert model.executor.startswith(f"generic: architecture {name}")
    for fidelity in ("dense", "exact"):
        made = model.generate(ids, max_new_tokens=14, fidelity=fidelity, thresholds=0.02, **given)
        assert torch.equal(made, plain), fidelity


@pytest.mark.parametrize("kv_mode", ["propagate", "skip"])
def test_lossy_modes_run_where_each_layer_type_has_its_own_rotary_table(kv_mode) -> None:
    model = AdaptiveModel(survey.tiny("gemma3_text"), [1, 2])
    made = model.generate(
        torch.arange(3, 12).unsqueeze(0),
        max_new_tokens=12,
        fidelity="threshold",
        thresholds=1e-6,
        kv_mode=kv_mode,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert made.sequences.shape == (1, 21) and made.trace.layers_per_token < 2


def test_a_model_whose_forward_does_more_than_its_layers_is_refused_by_the_probe(monkeypatch):
    base = survey.tiny("olmo3")
    own = type(base.model).forward

    def scaled(self, *args, **kwargs):
        made = own(self, *args, **kwargs)
        made.last_hidden_state = made.last_hidden_state * 1.01  # no convention knows of this
        return made

    monkeypatch.setattr(type(base.model), "forward", scaled)
    with pytest.raises(
        DeliberateError, match=r"'olmo3' is not supported: .*logits differ"
    ) as error:
        AdaptiveModel(base, [1, 2])
    assert "\n" not in str(error.value)


def test_a_window_that_is_not_heeded_shows_in_the_probe() -> None:
    backbone = Backbone(survey.tiny("starcoder2"))
    assert probing.probe(backbone).past_window
    backbone.layer_types = ("full_attention",) * 4
    backbone._steps = tuple(zip(backbone.layers, backbone.layer_types, strict=True))
    assert max(probing.probe(backbone).differences.values()) > 1e-3


def test_a_model_is_probed_once(monkeypatch) -> None:
    base, calls = survey.tiny("ernie4_5"), []
    real = probing.probe
    monkeypatch.setattr(probing, "probe", lambda backbone: calls.append(1) or real(backbone))
    AdaptiveModel(base, [1, 2])
    AdaptiveModel(base, [1])
    assert calls == [1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "'linear_attention' layers keep a state"),
        ("qwen3_next", "'linear_attention' layers keep a state"),
        ("mpt", "'position_bias'"),
        ("bloom", "'word_embeddings_layernorm'"),
        ("bert", "embeddings, encoder"),
    ],
)
def test_what_does_not_follow_the_conventions_is_refused_in_one_line_that_says_where(name, reason):
    base = survey.tiny(name)
    with pytest.raises(DeliberateError, match=reason) as error:
        AdaptiveModel(base, [1])
    assert "\n" not in str(error.value) and f"{name!r} is not supported" in str(error.value)


def test_a_layer_that_takes_no_cache_is_refused() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states, attention_mask=None):
            return hidden_states

    base = survey.tiny("olmo3")
    base.model.layers = nn.ModuleList([Layer()])
    with pytest.raises(DeliberateError, match="takes no key/value cache"):
        by_convention(base)


def test_the_survey_says_of_an_architecture_whether_it_runs() -> None:
    found = survey.verdict("starcoder2")
    assert found.runs and "past its window" in found.detail
    assert survey.verdict("mamba").runs is False
    assert survey.verdict("llama").detail.startswith("tested entry")
    with pytest.raises(DeliberateError, match="'nothing' is unknown to transformers"):
        survey.verdict("nothing")
    page = survey.page([found, survey.Verdict("mamba", False, "a | b")])
    assert "## Run: 1" in page and "| `mamba` | a / b |" in page


def test_the_page_lists_what_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    for name in (*ARCHITECTURES, *BY_CONVENTION):
        assert f"| `{name}` |" in page.split("## Refused")[0], name
    assert page.count("\n| `") > 150


def test_conventions_do_not_depend_on_sizes() -> None:
    """A small model of another size follows the same conventions."""
    config = AutoConfig.for_model("olmo3", num_hidden_layers=2, hidden_size=32, vocab_size=97,
                                  num_attention_heads=4, num_key_value_heads=4,
                                  intermediate_size=32)  # fmt: skip
    assert by_convention(AutoModelForCausalLM.from_config(config)).layers == "layers"
