"""Drafts looked up in the text so far: what is proposed, and that exact mode stays exact."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.utils.errors import DeliberateError

PERIOD = [7, 3, 11, 5, 9]


def repeating(model, tokens=30):
    """A prompt in which the model's own greedy continuation is likely to be found again."""
    ids = torch.tensor([PERIOD * 3])
    made = model.generate(ids, max_new_tokens=tokens, fidelity="dense", eos_token_id=None)
    return torch.cat((made, made[:, :4]), dim=1)


def adaptive(arch="llama", **settings):
    model = tiny_model(arch, dtype=torch.float64, **settings)
    return AdaptiveModel(model, [1, 2], executor="generic")


def test_what_followed_the_longest_match_last_time_is_proposed():
    drafts = NgramDrafts(3)
    for _ in range(8):
        drafts.note_drafts(3, 3, 0.0)  # all are worth verifying
    #  (1 2) is followed by 3 first and by 9 later; (0 1 2) only by 3.
    text = [0, 1, 2, 3, 4, 5, 1, 2, 9, 8, 6, 0, 1, 2]
    assert drafts.propose(text, 10) == [3, 4, 5]
    assert NgramDrafts(3).propose([*text[:11], 1, 2], 10) == [9, 8]
    assert NgramDrafts(3).propose([*text[:11], 1, 2], 1) == [9]
    assert NgramDrafts(3).propose([4, 5, 6, 7], 3) == []


def test_a_match_is_never_the_end_of_the_text_itself():
    assert NgramDrafts(4).propose([5, 5, 5], 4) == [5]
    assert NgramDrafts(4).propose([5, 6], 4) == []


def test_drafts_that_are_always_rejected_are_soon_declined_and_tried_again_later():
    drafts, text = NgramDrafts(6), PERIOD * 4
    drafts.note_single(1.0)
    counts = []
    for _ in range(60):
        count = len(drafts.propose(text, 6))
        counts.append(count)
        if count:
            drafts.note_drafts(count, 0, 1.0 + 0.2 * count)
        else:
            drafts.note_single(1.0)
    assert counts[0] > 0
    tried = [index for index, count in enumerate(counts) if count]
    assert len(tried) < 12
    assert any(index > 30 for index in tried) and counts[tried[-1]] == 1


def test_accepted_drafts_that_cost_little_are_verified_as_many_as_there_are():
    drafts = NgramDrafts(6)
    drafts.note_single(1.0)
    for _ in range(10):
        drafts.note_drafts(6, 6, 1.1)
    assert len(drafts.propose(PERIOD * 4, 6)) == 5  # all that the match has before the text ends


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_looked_up_drafts_leave_the_output_of_dense(arch):
    model = adaptive(arch)
    prompt = repeating(model)
    settings = {"max_new_tokens": 40, "return_dict_in_generate": True}
    dense = model.generate(prompt, fidelity="dense", **settings)
    exact = model.generate(prompt, lookup_tokens=5, **settings)
    assert exact.sequences.tolist() == dense.sequences.tolist()
    assert exact.trace.drafted > 0


def foretelling(monkeypatch, truth, prompt_tokens, wrong=()):
    """Drafts are the truth, but for those at these places of the output."""

    def propose(_self, ids, most):
        made = len(ids) - prompt_tokens
        multi_step = range(made, min(made + min(3, most), len(truth)))
        return [(truth[index] + (index in wrong)) % VOCAB for index in multi_step]

    monkeypatch.setattr(NgramDrafts, "propose", propose)


def test_accepted_drafts_save_passes_which_hooks_count(monkeypatch):
    model, prompt = adaptive(), random_ids(9)
    dense = model.generate(prompt, max_new_tokens=41, fidelity="dense")
    foretelling(monkeypatch, dense[0, 9:].tolist(), 9)
    calls = []
    hook = model.base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    out = model.generate(prompt, max_new_tokens=41, lookup_tokens=6, return_dict_in_generate=True)
    hook.remove()
    trace = out.trace
    assert out.sequences.tolist() == dense.tolist()
    # The prompt's pass chooses one token, each later pass three drafts and one more.
    assert len(calls) == 1 + trace.layer_calls[0] == 1 + 10
    assert trace.drafted == 30 and trace.discarded == 0
    assert {record.exit_layer for record in trace.records} == {0, model.backbone.num_layers}
    assert all(record.verified for record in trace.records)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "gemma2"])
def test_rejected_drafts_are_rolled_back_in_every_layer(arch, monkeypatch):
    model, prompt = adaptive(arch), random_ids(9)
    dense = model.generate(prompt, max_new_tokens=40, fidelity="dense")
    foretelling(monkeypatch, dense[0, 9:].tolist(), 9, wrong={3, 4, 8, 15, 16, 17, 30})
    out = model.generate(prompt, max_new_tokens=40, lookup_tokens=6, return_dict_in_generate=True)
    assert out.sequences.tolist() == dense.tolist()
    assert out.trace.rejected > 3 and out.trace.drafted > 20


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_output_ends_where_dense_ends_it(limit):
    model = adaptive()
    prompt = repeating(model)
    made = model.generate(prompt, max_new_tokens=8, fidelity="dense")[0, prompt.shape[1] :]
    ends = {"max_new_tokens": 20, "eos_token_id": int(made[limit - 1])}
    for settings in ({"max_new_tokens": limit}, ends):
        dense = model.generate(prompt, fidelity="dense", **settings)
        assert model.generate(prompt, lookup_tokens=4, **settings).tolist() == dense.tolist()


def test_sampling_draws_what_dense_draws_at_the_same_seed():
    model = adaptive()
    prompt = repeating(model)
    for seed in range(4):
        settings = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.3, "seed": seed}
        dense = model.generate(prompt, fidelity="dense", **settings)
        assert model.generate(prompt, lookup_tokens=4, **settings).tolist() == dense.tolist()


def test_processors_see_the_accepted_tokens_only():
    model = adaptive()
    prompt = repeating(model)
    settings = {"max_new_tokens": 24, "repetition_penalty": 1.1, "no_repeat_ngram_size": 6}
    dense = model.generate(prompt, fidelity="dense", **settings)
    assert model.generate(prompt, lookup_tokens=4, **settings).tolist() == dense.tolist()


def test_a_stock_model_is_decoded_with_drafts_looked_up_and_no_exit_evaluated(monkeypatch):
    model = adaptive()
    prompt = repeating(model)
    evaluated = []
    monkeypatch.setattr(type(model.reader()), "score", lambda *_: evaluated.append(1))
    with pytest.warns(UserWarning, match="looks its drafts up in prompt and output"):
        out = model.generate(prompt, max_new_tokens=20, return_dict_in_generate=True)
    assert out.trace.drafted > 0 and not evaluated


def test_trained_exits_and_given_thresholds_are_evaluated_as_before():
    model = adaptive()
    ids = random_ids(12)
    out = model.generate(ids, max_new_tokens=12, thresholds=0.01, return_dict_in_generate=True)
    assert out.trace.drafted > 0 and out.batch.reads
    policy = FixedPolicy((0.01, 0.01))
    out = model.generate(ids, max_new_tokens=12, exit_policy=policy, return_dict_in_generate=True)
    assert out.trace.drafted > 0 and out.batch.reads
    with torch.no_grad():
        model.exits.translators[0].up.weight[0, 0] = 0.5
    out = model.generate(ids, max_new_tokens=12, return_dict_in_generate=True)
    assert 0 not in out.trace.exit_histogram


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fidelity": "threshold"}, "use 'exact'"),
        ({"fidelity": "dense"}, "use 'exact'"),
        ({"thresholds": 0.5}, "of exits"),
        ({"decide": lambda *_: True}, "of exits"),
        ({"exit_policy": FixedPolicy((0.5, 0.5))}, "of exits"),
        ({"online": False}, "of exits"),
        ({"strict": True}, "leave strict out"),
    ],
)
def test_what_looked_up_drafts_cannot_go_with_is_refused_by_name(settings, said):
    model = adaptive()
    with pytest.raises(DeliberateError, match=f"lookup_tokens=4: .*{said}"):
        model.generate(random_ids(8), max_new_tokens=4, lookup_tokens=4, **settings)
    with pytest.raises(DeliberateError, match="a batch of 2"):
        model.generate(random_ids(8).repeat(2, 1), max_new_tokens=4, lookup_tokens=4)
    with pytest.raises(DeliberateError, match="lookup_tokens=-1"):
        model.generate(random_ids(8), max_new_tokens=4, lookup_tokens=-1)


def test_a_model_whose_rotary_frequencies_change_evaluates_exits_or_refuses_by_name(monkeypatch):
    model = adaptive()
    monkeypatch.setattr(type(model.backbone), "rope_switch", property(lambda _: 64), raising=False)
    out = model.generate(random_ids(8), max_new_tokens=4, return_dict_in_generate=True)
    assert 0 not in out.trace.exit_histogram
    with pytest.raises(DeliberateError, match=r"lookup_tokens=4: .*rotary frequencies"):
        model.generate(random_ids(8), max_new_tokens=4, lookup_tokens=4)


def test_scores_of_looked_up_tokens_are_dense_s():
    base = tiny_model("llama", hidden_size=256, intermediate_size=512)
    model = AdaptiveModel(base.float(), [1], executor="fused", engine="native")
    how = {"max_new_tokens": 60, "output_scores": True, "return_dict_in_generate": True}
    dense, exact = (model.generate(random_ids(60), fidelity=f, **how) for f in ("dense", "exact"))
    assert torch.equal(exact.sequences, dense.sequences) and len(exact.scores) == 60
    assert all(torch.equal(*pair) for pair in zip(exact.scores, dense.scores, strict=True))


def test_a_text_that_is_rewound_is_read_anew():
    drafts = NgramDrafts(4)
    assert drafts.find([1, 2, 3, 4, 5, 6], 4) == []
    drafts.rewind(2)
    assert drafts.find([1, 2, 7, 9, 5, 7, 9], 4)[:1] == [5]
