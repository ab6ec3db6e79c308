"""An exit as a model of its own: it answers as the exit does, and others draft with it."""

from __future__ import annotations

import pytest
import torch
from random_checkpoint import save_checkpoint
from tiny_models import ARCHITECTURES, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder
from deliberate.data.word_problems import word_problems
from deliberate.export.draft import export_draft
from deliberate.export.exit_model import exit_model
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError

LAYERS, EXITS = 4, (1, 3)


def with_exits(arch: str, translator: str, **overrides: object) -> AdaptiveModel:
    """A random model with random translators."""
    config = ExitConfig(layers=EXITS, thresholds=(0.5, 0.5), translator=translator, rank=4)
    model = AdaptiveModel(tiny_model(arch, layers=LAYERS, **overrides), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.exits.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.add_(0.2 * noise.to(weight.dtype))
    return model


def exit_logits(model: AdaptiveModel, index: int, ids: torch.Tensor) -> torch.Tensor:
    """By hand: norm, translator, head."""
    states = model(input_ids=ids, output_exit_states=True).exits[index]
    normed = model.exits.translate(index, model.backbone.norm(states))
    return model.backbone.head_logits(normed)


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("translator", ["none", "low_rank", "full"])
def test_the_model_has_the_logits_of_the_exit(arch, translator):
    model = with_exits(arch, translator, tie_word_embeddings=translator != "none")
    ids = random_ids(12, seed=3, batch=2)
    for index, depth in enumerate(EXITS):
        shallow = exit_model(model, index)
        assert shallow.config.num_hidden_layers == depth
        expected = exit_logits(model, index, ids)
        torch.testing.assert_close(shallow(input_ids=ids).logits, expected)


def test_the_wrapped_model_is_left_as_it_was():
    model = with_exits("llama", "full", tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    exit_model(model, 0)
    assert model.config.num_hidden_layers == LAYERS
    assert model.config.tie_word_embeddings
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_translator_that_the_cut_model_does_not_carry_is_noticed(monkeypatch):
    from deliberate.export import exit_model as module

    monkeypatch.setattr(module, "_own_head", lambda *_: None)
    with pytest.raises(DeliberateError, match="gives other logits than the exit"):
        exit_model(with_exits("llama", "full"), 0)


@torch.no_grad()
def test_as_an_assistant_it_changes_no_answer_and_most_drafts_are_accepted(tmp_path):
    model = AdaptiveModel.from_pretrained("tiny", executor="generic")
    made = export_draft("tiny", tmp_path / "draft")
    assert (made.layer, made.layers) == (2, 8)
    draft = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    encoder = Encoder(checkpoint.load_tokenizer(made.path), max_tokens=10**6)
    passes = tokens = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    for problem in word_problems("test", size=4, seed=11):
        ids = torch.tensor([encoder.prompt(problem.question)])
        plain = model.base.generate(ids, do_sample=False, max_new_tokens=48)
        hook = model.base.register_forward_hook(count)
        assisted = model.base.generate(
            ids, assistant_model=draft, do_sample=False, max_new_tokens=48
        )
        hook.remove()
        assert torch.equal(assisted, plain)
        tokens += plain.shape[1] - ids.shape[1]
    assert tokens > 2.5 * passes


@torch.no_grad()
def test_the_last_layer_is_the_whole_model(tmp_path):
    model = AdaptiveModel.from_pretrained("tiny", executor="generic")
    made = export_draft("tiny", tmp_path / "whole", layer=8)
    assert (made.layer, made.layers) == (8, 8)
    ids = torch.tensor([[5, 6, 7]])
    own = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    assert torch.equal(own(ids).logits, model.base(ids).logits)
    assert checkpoint.read_adaptive_config(str(made.path)) is None


def test_a_folder_holds_the_tokenizer_and_is_no_adaptive_model(tmp_path):
    made = export_draft("tiny", tmp_path / "new" / "draft", layer=4)
    text = "Tom has 12 apples and eats 3."
    own, whole = (checkpoint.load_tokenizer(one) for one in (made.path, "tiny"))
    assert own.encode(text) == whole.encode(text)
    assert checkpoint.read_adaptive_config(str(made.path)) is None
    assert [path.name for path in made.path.parent.iterdir()] == ["draft"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 5}, "layer 5 has no exit: the model's are after layers 2, 4, 6"),
        ({"dtype": "f16"}, "dtype 'f16' is for GGUF files"),
        ({"pre": "gpt-2"}, "pre 'gpt-2' is for GGUF files"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_writes_nothing(tmp_path, settings, message):
    with pytest.raises(DeliberateError, match=message):
        export_draft("tiny", tmp_path / "draft", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder", "model.gguf"])
def test_a_place_that_is_none_is_named_before_loading(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeliberateError, match="file is a file, a folder is needed"):
        export_draft("no/such-model", tmp_path / "file" / name)


def test_what_exists_is_not_written_over(tmp_path):
    with pytest.raises(DeliberateError, match="exists: name a new folder"):
        export_draft("tiny", tmp_path)


def test_untrained_exits_are_refused_before_anything_is_written(tmp_path):
    base = tiny_model("llama", layers=LAYERS)
    AdaptiveModel(base, [1, 2]).save_pretrained(tmp_path / "model", merge=True)
    with pytest.raises(DeliberateError, match=r"never trained.*deliberate fit"):
        export_draft(str(tmp_path / "model"), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_a_failure_while_writing_leaves_no_folder(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path / "model")

    class Unwritable:
        backend_tokenizer = None

        def save_pretrained(self, _folder: object) -> None:
            raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda _: Unwritable())
    with pytest.raises(OSError, match="disk full"):
        export_draft(str(folder), tmp_path / "draft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
