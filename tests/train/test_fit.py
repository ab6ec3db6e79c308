"""`deliberate fit`: from a model's own text to exits and a draft layer, and what each part does."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.engine.layer_drafts import CONTEXT
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.modeling.exit_config import ExitConfig, Translator
from deliberate.train.draft.agreement import measure_agreement
from deliberate.train.draft.draft_trainer import DraftData, DraftTrainer, DraftTraining
from deliberate.train.draft.fit import fit, resized
from deliberate.train.draft.fit_command import fit_config
from deliberate.train.draft.hidden_cache import HiddenCache, bytes_per_token, collect, run_text
from deliberate.train.draft.own_text import OwnText, read_own_text, write_own_text
from deliberate.train.draft.ridge import Ridge
from deliberate.train.draft.soft_loss import soft_cross_entropy
from deliberate.train.draft.start import draft_config, fit_joining, start_from_model
from deliberate.train.draft.translators import fit_translators, measure_exits, threshold_for
from deliberate.train.draft.vocabulary import cost_of_size, coverage, frequent_tokens
from deliberate.utils.errors import DeliberateError

SOURCE = {"model": "tiny", "text": "drawn"}


def texts(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 20, (count,), generator=generator).tolist()
    return [
        (torch.randint(0, VOCAB, (length,), generator=generator).tolist(), 3) for length in lengths
    ]


@pytest.fixture
def backbone():
    return Backbone(tiny_model("llama", dtype=torch.float32))


def cached(folder, backbone, layers=(2, 3, 4), most=10_000, given=None):
    given = texts() if given is None else given
    return collect(folder, backbone, given, layers, source=SOURCE, most_tokens=most)


def test_the_cache_holds_the_states_of_every_text_in_bfloat16(tmp_path, backbone):
    cache = cached(tmp_path, backbone)
    size = backbone.hidden_size
    assert cache.bytes_per_token == bytes_per_token(3, size) == 3 * 2 * size + 4
    assert (tmp_path / "states-2.bf16").stat().st_size == cache.count * size * 2
    for text, (ids, prompt) in zip(cache.texts, texts(), strict=True):
        rows = slice(text.start, text.start + text.length)
        assert cache.tokens()[rows].tolist() == ids
        assert text.prompt == prompt
        for layer, states in zip((2, 3, 4), run_text(backbone, ids, (2, 3, 4)), strict=True):
            assert cache.states(layer)[rows].equal(states.to(torch.bfloat16))


def test_an_interrupted_cache_goes_on_and_one_of_another_text_starts_anew(tmp_path, backbone):
    class Stop(Exception):
        pass

    def broken():
        yield from texts()[:4]
        raise Stop

    whole = cached(tmp_path / "whole", backbone)
    with pytest.raises(Stop):
        collect(tmp_path / "part", backbone, broken(), (2, 3, 4), source=SOURCE, most_tokens=999)
    again = cached(tmp_path / "part", backbone)
    assert again.texts == whole.texts
    for layer in whole.layers:
        assert again.states(layer).equal(whole.states(layer))
    other = collect(
        tmp_path / "part", backbone, texts(seed=5), (2, 3, 4), source={"a": 1}, most_tokens=999
    )
    assert other.tokens().tolist() == [token for ids, _ in texts(seed=5) for token in ids]


def test_a_cache_that_is_cut_or_no_cache_is_one_line(tmp_path, backbone):
    cached(tmp_path, backbone)
    with pytest.raises(DeliberateError, match="after layer 1 are not in"):
        HiddenCache(tmp_path).states(1)
    (tmp_path / "states-3.bf16").write_bytes(b"1234")
    with pytest.raises(DeliberateError, match=r"states-3\.bf16 is shorter"):
        HiddenCache(tmp_path)
    with pytest.raises(DeliberateError, match="no cache of hidden states"):
        HiddenCache(tmp_path / "nothing")


def test_ridge_finds_the_map_that_made_the_rows():
    torch.manual_seed(0)
    wanted, x = torch.randn(5, 7), torch.randn(400, 7)
    ridge = Ridge(7, 5)
    for part in x.split(64):
        ridge.add(part, part @ wanted.T)
    assert torch.allclose(ridge.solve(1e-8), wanted, atol=1e-4)
    assert float(ridge.solve(100.0).norm()) < 0.1 * float(wanted.norm())


def test_translators_of_states_that_are_a_linear_map_agree_everywhere(tmp_path, backbone):
    config = ExitConfig.build(4, [3], translator=Translator.FULL)
    model = AdaptiveModel(backbone.model, config, executor="generic")
    many = texts(40)
    cache = cached(tmp_path, backbone, given=many)
    before = measure(model, cache)
    fit_translators(model.exits, cache, cache.texts, backbone.norm)
    after = measure(model, cache)
    assert after.agreement > before.agreement + 0.05
    assert model.exits.trained


def measure(model, cache):
    backbone = model.backbone
    (one,) = measure_exits(
        model.exits, cache, cache.texts, backbone.norm, backbone.head_logits, target=0.9
    )
    return one


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=20, max_size=80), st.floats(0.3, 1.0))
def test_a_threshold_keeps_the_share_that_was_asked_for(agreed, target):
    scores = torch.linspace(0.99, 0.2, len(agreed))
    threshold, share = threshold_for(torch.tensor(agreed), scores, target)
    kept = torch.tensor(agreed)[scores >= threshold]
    if share:
        assert float(kept.float().mean()) >= target - 1e-6
    else:
        assert not len(kept)


def test_frequent_tokens_rise_and_low_ids_fill_up():
    tokens = torch.tensor([9, 9, 9, 4, 4, 7])
    assert frequent_tokens(tokens, 2, 10).tolist() == [4, 9]
    assert frequent_tokens(tokens, 5, 10).tolist() == [0, 1, 4, 7, 9]
    assert frequent_tokens(tokens, 99, 10).tolist() == list(range(10))
    assert coverage(tokens, torch.tensor([4, 9])) == pytest.approx(5 / 6)


def test_the_cost_of_a_vocabulary_counts_drafts_only_where_they_pay():
    good = cost_of_size(8, (0.8, 0.6), draft_seconds=0.05, single=1.0, more=0.05)
    assert good.drafts == 2
    assert good.seconds_per_token == pytest.approx(1.2 / 2.4)
    bad = cost_of_size(8, (0.1, 0.0), draft_seconds=0.3, single=1.0, more=0.1)
    assert (bad.drafts, bad.seconds_per_token) == (0, 1.0)


def test_the_joining_matrix_starts_where_the_last_layers_input_is_predicted_best(
    tmp_path, backbone
):
    cache = cached(tmp_path, backbone, given=texts(60))
    layer = DraftLayer(draft_config(backbone, VOCAB))
    assert start_from_model(layer, backbone)
    data = DraftData(cache, backbone.embed_tokens, backbone.norm)
    pairs = []
    for text in cache.texts:
        read = data.read(text)
        below = cache.states(3)[text.start + 1 : text.start + text.length].float()
        pairs.append((read.embedded, read.normed[:-1], below))

    def error():
        with torch.no_grad():
            return sum(
                float((layer.join(one, two) - three).square().sum()) for one, two, three in pairs
            )

    before = error()
    fit_joining(layer, pairs)
    assert error() < 0.8 * before


def trained(folder, cache, backbone, steps=None, passes=3.0):
    torch.manual_seed(0)
    layer = DraftLayer(draft_config(backbone, VOCAB))
    data = DraftData(cache, backbone.embed_tokens, backbone.norm)
    how = DraftTraining(passes=passes, depth=2, texts_per_step=2, learning_rate=3e-3)
    head = backbone.lm_head.weight.detach()
    trainer = DraftTrainer(layer, head, data, cache.texts, how, dtype=torch.float32)
    losses = []

    def note(step, loss):
        losses.append(loss)
        if step == steps:
            raise KeyboardInterrupt

    trainer.resume(folder / "draft.pt")
    try:
        trainer.run(note=note, save=folder / "draft.pt", save_every=0.0)
    except KeyboardInterrupt:
        trainer.save(folder / "draft.pt")
    return layer, losses


def test_training_lowers_the_loss_and_raises_agreement_and_resumes_to_the_same_layer(
    tmp_path, backbone
):
    cache = cached(tmp_path / "cache", backbone, given=texts(8) * 2)
    whole, losses = trained(tmp_path / "a", cache, backbone, passes=6.0)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    data = DraftData(cache, backbone.embed_tokens, backbone.norm)
    head = backbone.lm_head.weight.detach()
    fresh = DraftLayer(draft_config(backbone, VOCAB))
    found = [
        measure_agreement(one, head, head, data, cache.texts, depth=2) for one in (fresh, whole)
    ]
    assert found[1].survives[0] > found[0].survives[0] + 0.05
    assert found[1].survives[0] >= found[1].survives[1]
    assert found[1].tokens_per_pass(2) == pytest.approx(1 + sum(found[1].survives))
    trained(tmp_path / "b", cache, backbone, steps=7, passes=6.0)
    resumed, rest = trained(tmp_path / "b", cache, backbone, passes=6.0)
    assert len(rest) == len(losses) - 7
    for name, weight in whole.named_parameters():
        assert torch.allclose(dict(resumed.named_parameters())[name], weight, atol=1e-6)


def test_the_loss_and_its_gradient_are_those_of_cross_entropy_to_a_distribution():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64).softmax(dim=-1)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    same = logits.detach().clone().requires_grad_(True)
    found = soft_cross_entropy(logits, teacher)
    wanted = torch.nn.functional.cross_entropy(same, teacher)
    assert torch.allclose(found, wanted)
    (3 * found).backward()
    (3 * wanted).backward()
    assert torch.allclose(logits.grad, same.grad)


def test_training_reads_the_newest_states_of_a_prompt_as_decoding_does(tmp_path, backbone):
    given = [(list(range(50)), 45), (list(range(9)), 4)]
    cache = cached(tmp_path, backbone, given=given)
    whole = DraftData(cache, backbone.embed_tokens, backbone.norm, prompt_entries=None)
    data = DraftData(cache, backbone.embed_tokens, backbone.norm)
    for text, left in zip(cache.texts, (44 - CONTEXT, 0), strict=True):
        every, newest = whole.read(text), data.read(text)
        assert newest.first == every.first - left
        assert newest.embedded.equal(every.embedded[left:])
        assert newest.normed.equal(every.normed[left:])


def test_another_draft_vocabulary_needs_no_training(backbone):
    layer = DraftLayer(draft_config(backbone, VOCAB))
    other = resized(layer, torch.tensor([3, 5, 8]))
    assert other.config.vocabulary == 3
    assert other.qkv.equal(layer.qkv)


class Tokenizer:
    eos_token_id, bos_token_id, chat_template = 1, 1, None


def test_own_text_is_the_models_own_and_goes_on_after_an_interruption(tmp_path, backbone):
    model = AdaptiveModel(backbone.model, [1, 2], executor="generic")
    prompts = [[5, 6, 7, index] for index in range(8)]
    how = OwnText(tokens=1_000, max_new_tokens=10, batch_size=3, sampled=0.5)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    total = write_own_text(whole, model, Tokenizer, prompts, how)
    found = read_own_text(whole)
    assert 0 < total == sum(len(ids) - prompt for ids, prompt in found)
    greedy = model.generate(torch.tensor([prompts[0]]), max_new_tokens=10, fidelity="dense",
                            eos_token_id=1)[0].tolist()  # fmt: skip
    assert found[0][0] == greedy
    lines = whole.read_text().splitlines()
    part.write_text("\n".join(lines[:5]) + '\n{"index": 2, "tok')
    assert write_own_text(part, model, Tokenizer, prompts, how) == total
    assert part.read_text().splitlines()[:5] == lines[:5]
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(8))
    assert sorted(part.read_text().splitlines()) == sorted(lines)


def test_no_answer_is_begun_once_there_are_enough_tokens(tmp_path, backbone):
    model = AdaptiveModel(backbone.model, [1, 2], executor="generic")
    how = OwnText(tokens=15, max_new_tokens=10, batch_size=2, sampled=0.0)
    noted = []
    total = write_own_text(
        tmp_path / "own.jsonl", model, Tokenizer, [[5, 6, index] for index in range(9)], how,
        note=noted.append,
    )  # fmt: skip
    assert noted[-1] == total < 15 + 2 * 10


def test_answers_to_other_prompts_are_dropped(tmp_path, backbone):
    model = AdaptiveModel(backbone.model, [1, 2], executor="generic")
    how = OwnText(tokens=1_000, max_new_tokens=6, batch_size=2, sampled=0.0)
    path = tmp_path / "own.jsonl"
    write_own_text(path, model, Tokenizer, [[5, 6, 7], [5, 6, 8]], how)
    write_own_text(path, model, Tokenizer, [[5, 6, 7], [9, 6, 8]], how)
    assert [ids[:3] for ids, _ in read_own_text(path)] == [[5, 6, 7], [9, 6, 8]]


def test_the_command_writes_a_model_that_decodes_as_its_base_does(tmp_path):
    said = []
    words = ["tiny", f"out={tmp_path}", "text.tokens=900", "text.batch_size=8",
             "text.max_new_tokens=48", "text.questions=[words]", "draft.passes=0.3",
             "draft.vocabulary=300", "held_out=0.2"]  # fmt: skip
    done = fit(fit_config(words), say=said.append)
    assert {"adaptive_config.json", "exits.safetensors", "README.md", "fit.json"} <= {
        one.name for one in tmp_path.iterdir()
    }
    assert any("bytes a token" in line for line in said)
    record = json.loads((tmp_path / "fit.json").read_text())
    size = done.model.backbone.hidden_size
    each = {"exits": bytes_per_token(4, size), "draft": bytes_per_token(1, size)}
    assert record["tokens"]["bytes_each"] == each
    assert [one["layer"] for one in record["exits"]] == list(done.model.exit_config.layers)
    again = AdaptiveModel.from_pretrained(tmp_path)
    prompt = torch.tensor([read_own_text(next((tmp_path / "work").glob("own-*")))[0][0][:20]])
    dense = again.generate(prompt, max_new_tokens=24, fidelity="dense")
    again.attach_draft(done.model.draft.layer if done.model.draft else None, DraftPrior())
    assert again.generate(prompt, max_new_tokens=24).tolist() == dense.tolist()


def test_a_setting_that_cannot_work_is_one_line(tmp_path):
    for words, said in (
        (["tiny"], "out has no value"),
        (["tiny", "out=x", "--fast"], "does not know the option --fast"),
        (["tiny", "out=x", "draft.pases=2"], "pases"),
    ):
        with pytest.raises(DeliberateError, match=said):
            fit_config(words)
    for word, said in (
        ("held_out=0.9", "held_out=0.9 must be above 0.0 and at most 0.5"),
        ("draft.passes=0", "draft.passes=0"),
        ("draft.vocabulary=1", "draft.vocabulary=1"),
        ("draft.optimizer=sgd", "draft.optimizer=sgd must be one of adamw, muon"),
        ("text.tokens=0", "text.tokens=0"),
        (f"text.file={tmp_path}/none", "none is missing"),
    ):
        with pytest.raises(DeliberateError, match=said):
            fit(fit_config(["tiny", f"out={tmp_path}", word]))
