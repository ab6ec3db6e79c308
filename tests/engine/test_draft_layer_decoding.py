"""Exact mode with a draft layer gives what dense gives, at every draft length."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api import lookup
from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.utils.errors import DeliberateError


def draft_layer(model, vocabulary=VOCAB, seed=0):
    torch.manual_seed(seed)
    config = DraftLayerConfig(model.backbone.hidden_size, 4, 2, 8, 48, vocabulary)
    layer = DraftLayer(config)
    layer.vocabulary.copy_(torch.randperm(VOCAB)[:vocabulary].sort().values)
    return layer


def drafting(
    arch="llama", *, dtype=torch.float64, executor="generic", vocabulary=VOCAB, **settings
):
    model = AdaptiveModel(tiny_model(arch, dtype=dtype, **settings), [1, 2], executor=executor)
    model.attach_draft(draft_layer(model, vocabulary))
    return model


class Oracle:
    """Drafts what the model itself would say, but errs at every `wrong`-th draft."""

    def __init__(self, answer, prompt, wrong):
        self.answer, self.prompt, self.wrong, self.made = answer, prompt, wrong, 0
        self.length = 0

    def new_cache(self):
        return self

    def crop(self, length):
        self.length = min(self.length, length)

    def close(self):
        self.length = 0

    def extend_rows(self, caches, states, tokens):
        self.length += len(tokens[0])
        return states

    def read_rows(self, outputs):
        self.made += 1
        token = self.answer[min(self.length + 1, len(self.answer) - 1)]
        return [((token + 1) % VOCAB if self.made % self.wrong == 0 else token, 0.9)]


def fixed(model, monkeypatch, count, runner=None):
    """Drafts so many tokens before every pass, whatever they are worth."""
    sources = model.draft

    def drafts(backbone, most, lookup, rows=None):
        made = type(sources).drafts(sources, backbone, most, lookup, rows)
        return LayerDrafts(runner or made.runner, made._lengths, fixed=count)

    monkeypatch.setattr(sources, "drafts", drafts)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "qwen3"])
def test_any_draft_length_gives_denses_tokens(arch, count, monkeypatch):
    model = drafting(arch, vocabulary=60)
    fixed(model, monkeypatch, count)
    for prompt in (random_ids(9), random_ids(1)):
        dense = model.generate(prompt, max_new_tokens=24, fidelity="dense")
        out = model.generate(prompt, max_new_tokens=24, return_dict_in_generate=True)
        assert out.sequences.tolist() == dense.tolist()
        assert out.trace.drafted > 0


@pytest.mark.parametrize("wrong", [2, 3, 5])
def test_accepted_and_rejected_drafts_in_turn_give_denses_tokens(wrong, monkeypatch):
    model, prompt = drafting(), random_ids(7)
    dense = model.generate(prompt, max_new_tokens=40, fidelity="dense")
    fixed(model, monkeypatch, 4, Oracle(dense[0].tolist(), 7, wrong))
    out = model.generate(prompt, max_new_tokens=40, return_dict_in_generate=True)
    assert out.sequences.tolist() == dense.tolist()
    assert 0 < out.trace.rejected < out.trace.drafted
    full_passes = out.trace.layer_calls[-1]
    assert full_passes < 40 - 1


def test_the_entries_after_a_generation_equal_those_computed_anew(monkeypatch):
    model, prompt = drafting(), random_ids(7)
    dense = model.generate(prompt, max_new_tokens=30, fidelity="dense")
    sources, kept = model.draft, []

    def drafts(backbone, most, lookup, rows=None):
        made = type(sources).drafts(sources, backbone, most, lookup, rows)
        kept.append(LayerDrafts(made.runner, made._lengths, fixed=3))
        return kept[-1]

    monkeypatch.setattr(sources, "drafts", drafts)
    model.generate(prompt, max_new_tokens=30)
    source = kept[0]
    entries = source.entries
    assert entries > 20
    from deliberate.train.draft.hidden_cache import run_text

    ids = dense[0].tolist()[: entries + 1]
    with torch.no_grad():
        (states,) = run_text(model.backbone, ids, [model.backbone.num_layers])
    fresh = source.runner.new_cache()
    source.runner.extend(fresh, states[:-1], ids[1:])
    for name in ("keys", "values"):
        held, anew = getattr(source.cache, name), getattr(fresh, name)
        assert torch.allclose(held[:, :, :entries], anew[:, :, :entries], atol=1e-9)


def test_sampled_tokens_are_denses_at_the_same_seed(monkeypatch):
    model, prompt = drafting(), random_ids(7)
    fixed(model, monkeypatch, 3)
    how = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.8, "top_k": 7}
    for seed in (1, 2, 3):
        dense = model.generate(prompt, seed=seed, fidelity="dense", **how)
        assert model.generate(prompt, seed=seed, **how).tolist() == dense.tolist()


def test_penalties_and_end_tokens_hold_with_drafts(monkeypatch):
    model, prompt = drafting(), random_ids(7)
    fixed(model, monkeypatch, 4)
    how = {"max_new_tokens": 30, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    dense = model.generate(prompt, fidelity="dense", **how)
    assert model.generate(prompt, **how).tolist() == dense.tolist()
    end = int(dense[0, 7 + 11])
    how = {"max_new_tokens": 30, "eos_token_id": end}
    dense = model.generate(prompt, fidelity="dense", **how)
    assert model.generate(prompt, **how).tolist() == dense.tolist()


def test_a_padded_prompt_drafts_by_its_own_tokens(monkeypatch):
    model, prompt = drafting(), random_ids(7)
    fixed(model, monkeypatch, 3)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    alone = model.generate(prompt, max_new_tokens=16, return_dict_in_generate=True)
    beside = model.generate(
        padded, attention_mask=mask, max_new_tokens=16, return_dict_in_generate=True
    )
    assert beside.sequences[0, 3:].tolist() == alone.sequences[0].tolist()
    assert beside.trace.drafted == alone.trace.drafted
    assert beside.trace.rejected == alone.trace.rejected


def test_the_fused_executor_drafts_by_its_kernels():
    model = drafting(dtype=torch.float32, executor="auto")
    dense = model.generate(random_ids(9), max_new_tokens=40, fidelity="dense")
    for _ in range(2):
        assert model.generate(random_ids(9), max_new_tokens=40).tolist() == dense.tolist()


def test_a_saved_draft_layer_comes_back_with_its_prior(tmp_path):
    model = drafting(vocabulary=50, dtype=torch.float32)
    prior = DraftPrior(survives=(0.6, 0.4), draft_cost=0.07)
    layer = model.draft.layer
    model.attach_draft(layer, prior)
    model.save_pretrained(tmp_path, merge=True)
    again = AdaptiveModel.from_pretrained(tmp_path, executor="generic")
    assert again.draft.prior == prior
    assert again.draft.layer.vocabulary.equal(layer.vocabulary)
    for name, weight in layer.named_parameters():
        kept = dict(again.draft.layer.named_parameters())[name]
        assert kept.equal(weight.detach().to(torch.bfloat16).float())
    model.attach_draft(None)
    model.save_pretrained(tmp_path, merge=True)
    assert AdaptiveModel.from_pretrained(tmp_path).draft is None


def test_a_foreign_or_missing_draft_file_is_one_line(tmp_path):
    model = drafting(vocabulary=50, dtype=torch.float32)
    model.save_pretrained(tmp_path, merge=True)
    path = tmp_path / "draft.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DeliberateError, match=r"draft\.safetensors is truncated"):
        AdaptiveModel.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(DeliberateError, match=r"draft\.safetensors is missing"):
        AdaptiveModel.from_pretrained(tmp_path)


def test_draft_tokens_is_obeyed_or_refused_by_name():
    model = drafting()
    out = model.generate(random_ids(8), max_new_tokens=8, draft_tokens=0, lookup_tokens=0,
                         return_dict_in_generate=True)  # fmt: skip
    assert out.trace.drafted == 0 or set(out.trace.exit_layers) > {0}
    for settings, said in (
        ({"fidelity": "dense"}, "verifies no drafts"),
        ({"thresholds": 0.5}, "thresholds and decide are of exits"),
        ({"strict": True}, "strict"),
    ):
        with pytest.raises(DeliberateError, match=f"draft_tokens=4: .*{said}"):
            model.generate(random_ids(8), max_new_tokens=4, draft_tokens=4, **settings)
    with pytest.raises(DeliberateError, match="draft_tokens=4: a batch of 2"):
        model.generate(random_ids(8).repeat(2, 1), max_new_tokens=4, draft_tokens=4)
    model.attach_draft(None)
    with pytest.raises(DeliberateError, match="draft_tokens=4: the model has no draft layer"):
        model.generate(random_ids(8), max_new_tokens=4, draft_tokens=4)


def test_a_copy_drafts_as_the_model_does():
    model = drafting()
    prompt = random_ids(9)
    made = model.generate(prompt, max_new_tokens=16)
    again = copy.deepcopy(model)
    assert again.generate(prompt, max_new_tokens=16).tolist() == made.tolist()
    assert again.draft is not model.draft


def test_loading_a_stock_checkpoint_says_in_one_line_what_exact_mode_does(
    tmp_path, caplog, monkeypatch
):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="deliberate"):
        AdaptiveModel.from_pretrained(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "deliberate"]
    assert "no trained exits: n-gram drafts only" in line
    assert f"`deliberate fit {tmp_path} out=DIR` takes about 1 minute" in line
    assert "int4" not in line  # its weights lie in the processor's caches
    caplog.clear()
    monkeypatch.setattr(lookup, "_BEYOND_CACHES", 1)
    with caplog.at_level("WARNING", logger="deliberate"):
        AdaptiveModel.from_pretrained(tmp_path)
        AdaptiveModel.from_pretrained(tmp_path, weights="bf16")
        for weights in ("int4", "int8"):
            AdaptiveModel.from_pretrained(tmp_path, weights=weights)
    said = [record.getMessage() for record in caplog.records if record.name == "deliberate"]
    assert [("drafts='int4'" in one) for one in said] == [True, True, False, False]
    caplog.clear()
    model = AdaptiveModel.from_pretrained("tiny")
    assert model.exits.trained
    assert not [record for record in caplog.records if record.name == "deliberate"]
