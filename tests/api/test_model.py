"""AdaptiveModel: wrapping, forward, saving and loading, files that are not what they should be."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import ARCHITECTURES, random_ids, tiny_model

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import ExitConfig, auto_exit_layers
from deliberate.utils.errors import DeliberateError


def trained(arch: str = "llama", **settings) -> AdaptiveModel:
    """A model whose exits are not at their initial values."""
    model = AdaptiveModel(tiny_model(arch, layers=6), ExitConfig.build(6, [1, 3], 0.05, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.exits.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model


@pytest.fixture()
def saved(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "m", merge=True)
    return tmp_path / "m"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_forward_with_exits_attached_gives_the_stock_logits(arch):
    base = tiny_model(arch, layers=6)
    ids = random_ids(9)
    with torch.inference_mode():
        stock = base(ids).logits
        assert torch.equal(AdaptiveModel(base, "auto")(ids).logits, stock)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_exit_states_are_the_hidden_states_after_each_exit_layer(arch):
    base = tiny_model(arch, layers=6)
    model = AdaptiveModel(base, [2, 5])
    ids = random_ids(9)
    with torch.inference_mode():
        hidden = base(ids, output_hidden_states=True).hidden_states
        states = model(ids, output_exit_states=True)
        assert torch.equal(states.exits[0], hidden[2])
        assert torch.equal(states.exits[1], hidden[5])
        torch.testing.assert_close(model.backbone.logits(states.last), base(ids).logits)


def test_untrained_exits_are_the_identity(tmp_path):
    model = AdaptiveModel(tiny_model("llama", layers=6), [2])
    normed = torch.randn(3, model.backbone.hidden_size, dtype=torch.float64)
    assert torch.equal(model.exits.translate(0, normed), normed)


@pytest.mark.parametrize("translator", ["none", "low_rank", "full"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_folded_reader_equals_translator_then_head(arch, translator):
    model = trained(arch, translator=translator)
    normed = torch.randn(4, model.backbone.hidden_size, dtype=torch.float64)
    with torch.inference_mode():
        for index in range(2):
            expected = model.backbone.head_logits(model.exits.translate(index, normed))
            torch.testing.assert_close(model.reader().logits(index, normed), expected)


def test_the_reader_follows_changed_weights():
    model = trained()
    normed = torch.randn(1, model.backbone.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        before = model.reader().logits(0, normed)
        model.exits.translators[0].up.weight.add_(0.5)
        after = model.reader().logits(0, normed)
        expected = model.backbone.head_logits(model.exits.translate(0, normed))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)


def test_auto_exits_rise_and_stay_below_the_top():
    for layers in range(2, 81):
        chosen = auto_exit_layers(layers)
        assert list(chosen) == sorted(set(chosen)) and chosen[0] >= 1 and chosen[-1] < layers
    assert auto_exit_layers(32) == (5, 11, 19)


# -- saving and loading ---------------------------------------------------------------------------


def test_a_merged_folder_gives_the_same_output_in_a_new_process(saved):
    model = AdaptiveModel.from_pretrained(saved, dtype="float64")
    ids = random_ids(5)
    expected = model.generate(ids, max_new_tokens=12, fidelity="threshold")[0].tolist()
    code = (
        "import torch\nfrom deliberate.api.model import AdaptiveModel\n"
        f"m = AdaptiveModel.from_pretrained({str(saved)!r}, dtype='float64')\n"
        f"o = m.generate(torch.tensor([{ids[0].tolist()}]), max_new_tokens=12, "
        "fidelity='threshold')\nprint(o[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_without_merge_only_the_exits_are_written_and_the_base_is_found_again(tmp_path):
    base_folder, folder = tmp_path / "base", tmp_path / "exits"
    tiny_model("llama", layers=6).save_pretrained(base_folder)
    model = AdaptiveModel.from_pretrained(base_folder, exits=[1, 3], dtype="float64")
    with torch.no_grad():
        model.exits.gates[0].weight.fill_(0.25)
    model.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {checkpoint.CONFIG_NAME, checkpoint.EXITS_NAME}
    again = AdaptiveModel.from_pretrained(folder, dtype="float64")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_saving_only_the_exits_of_a_nameless_base_is_refused(tmp_path):
    model = trained()
    model.base.config._name_or_path = ""
    with pytest.raises(DeliberateError, match="merge=True"):
        model.save_pretrained(tmp_path / "x")


def one_line(saved, words: str, **kwargs) -> None:
    with pytest.raises(DeliberateError) as caught:
        AdaptiveModel.from_pretrained(saved, **kwargs)
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_weights_file_is_named(saved):
    for name in ("model.safetensors", checkpoint.EXITS_NAME):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[: len(whole) // 2])
        one_line(saved, str(saved))
        (saved / name).write_bytes(whole)
    AdaptiveModel.from_pretrained(saved)


def test_a_missing_exits_file_is_named(saved):
    (saved / checkpoint.EXITS_NAME).unlink()
    one_line(saved, checkpoint.EXITS_NAME)


def test_foreign_exits_are_refused(saved, tmp_path):
    other = AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])
    other.save_pretrained(tmp_path / "other", merge=True)
    (saved / checkpoint.EXITS_NAME).write_bytes(
        (tmp_path / "other" / checkpoint.EXITS_NAME).read_bytes()
    )
    one_line(saved, "do not have")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"exits": {"layers": [1, 9], "thresholds": [0.5, 0.5]}}, "exit layer 9"),
        ({"exits": {"layers": [1], "thresholds": [0.5], "speed": 1}}, "'speed'"),
        ({"exits": {"layers": [1], "thresholds": [0.5], "measure": "hope"}}, "'hope'"),
        ({"exits": {"layers": [1]}}, "thresholds"),
    ],
)
def test_an_impossible_configuration_is_refused(saved, change, words):
    raw = json.loads((saved / checkpoint.CONFIG_NAME).read_text())
    (saved / checkpoint.CONFIG_NAME).write_text(json.dumps(raw | change))
    one_line(saved, words)


def test_broken_or_foreign_json_is_named(saved):
    (saved / checkpoint.CONFIG_NAME).write_text('{"exits": ')
    one_line(saved, "not valid JSON")
    (saved / checkpoint.CONFIG_NAME).write_text('{"exits": {}}')
    one_line(saved, "was not written by deliberate")


def test_a_folder_that_is_no_checkpoint_and_a_name_that_is_nothing_are_refused(tmp_path):
    one_line(tmp_path, "no config.json")
    one_line("no-such-model", "neither a folder")
    one_line("./no/such", "neither a folder")


def test_exits_given_for_a_model_that_has_them_are_refused(saved):
    one_line(saved, "has its own exits", exits=[2])


def test_unknown_exits_are_refused_when_wrapping():
    base = tiny_model("llama", layers=6)
    for exits, words in (([0], "exit layer 0"), ([6], "exit layer 6"), ([3, 2], "must rise")):
        with pytest.raises(DeliberateError, match=words):
            AdaptiveModel(base, exits)
    with pytest.raises(DeliberateError, match="'automatic'"):
        AdaptiveModel(base, "automatic")
