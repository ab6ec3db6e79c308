"""`generate(reasoning=, votes=)`: chains end where their policy says, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from deliberate import AdaptiveModel
from deliberate.api import checkpoint
from deliberate.reasoning.settings import ReasoningSettings, kept_for_answer, vote_rule
from deliberate.reasoning.votes import AdaptiveConsistency, FixedVotes
from deliberate.utils.errors import DeliberateError

QUESTION = "Question: Tom has 3 apples and buys 4 more. Then he eats 2. How many are left?\nAnswer:"


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel.from_pretrained("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return torch.tensor([tokenizer.encode(QUESTION)])


def reasoned(model, tokenizer, ids, reasoning="none", **given):
    given = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True} | given
    return model.generate(ids, reasoning=reasoning, tokenizer=tokenizer, **given)


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_chain_without_a_policy_is_the_plain_output(model, tokenizer, ids, fidelity):
    plain = model.generate(ids, max_new_tokens=64, do_sample=False, fidelity=fidelity)
    made = reasoned(model, tokenizer, ids, fidelity=fidelity)
    assert torch.equal(made.sequences, plain)
    (chain,) = made.chains
    assert chain.tokens == plain[0, ids.shape[1] :].tolist()
    assert chain.probes == [] and chain.stopped is None and chain.finished
    assert 0 < chain.reasoning_tokens < len(chain.tokens) and chain.answer.isdigit()


def test_probes_stop_a_chain_and_are_in_the_output_with_their_cost(model, tokenizer, ids):
    made = reasoned(model, tokenizer, ids, {"probe": {"chunk": 3, "agree": 2}})
    (chain,) = made.chains
    assert chain.stopped == "2 probes agree"
    assert [probe.at for probe in chain.probes] == [3 * n for n in range(1, len(chain.probes) + 1)]
    assert chain.reasoning_tokens == chain.probes[-1].at
    assert chain.probe_tokens == sum(probe.tokens for probe in chain.probes) > 0
    assert chain.answer == chain.probes[-1].answer
    assert made.sequences[0, ids.shape[1] :].tolist() == chain.tokens


def test_a_limit_holds_for_every_row_of_a_padded_batch(model, tokenizer):
    texts = [QUESTION, "Question: Ann has 5 pens and gets 6. How many pens?\nAnswer:"]
    rows = [tokenizer.encode(text) for text in texts]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    batch = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    both = reasoned(
        model, tokenizer, batch, {"budget": 5}, attention_mask=mask, do_sample=True, seed=3
    )
    assert [chain.reasoning_tokens for chain in both.chains] == [5, 5]
    assert all(chain.answer for chain in both.chains)
    assert both.sequences.shape[0] == 2


def test_votes_sample_chains_until_their_rule_has_enough(model, tokenizer, ids):
    given = {"do_sample": True, "temperature": 0.7, "seed": 1}
    made = reasoned(model, tokenizer, ids, None, votes={"adaptive": {"most": 6}}, **given)
    (vote,) = made.votes
    assert 4 <= len(vote.chains) <= 6 and sum(vote.tally.counts) <= len(vote.chains)
    assert made.chains[0].answer == vote.answer
    assert made.sequences[0, ids.shape[1] :].tolist() == made.chains[0].tokens
    again = reasoned(model, tokenizer, ids, None, votes={"adaptive": {"most": 6}}, **given)
    assert [c.tokens for c in again.votes[0].chains] == [c.tokens for c in vote.chains]
    fixed = reasoned(model, tokenizer, ids, "probe", votes=3, **given)
    assert len(fixed.votes[0].chains) == 3
    assert len({tuple(chain.tokens) for chain in fixed.votes[0].chains}) > 1


def test_words_that_are_suppressed_and_extensions_are_of_the_reasoning(model, tokenizer, ids):
    plain = reasoned(model, tokenizer, ids).chains[0]
    text = tokenizer.decode(plain.tokens)
    word = next(word for word in text.split() if not word.isdigit())
    made = reasoned(model, tokenizer, ids, {"suppressed": [word]}).chains[0]
    assert made.tokens != plain.tokens
    longer = reasoned(model, tokenizer, ids, {"extensions": 1}, max_new_tokens=96).chains[0]
    assert "Wait" in tokenizer.decode(longer.tokens)
    assert longer.reasoning_tokens > plain.reasoning_tokens


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"structured": {"regex": "a"}}, "structured with reasoning="),
        ({"latency_budget": "L1"}, "latency_budget with reasoning="),
        ({"fidelity": "certified"}, "fidelity 'certified' with reasoning="),
        ({"output_scores": True}, "output_scores with reasoning="),
        ({"stop_strings": ["."]}, "StopStringCriteria with reasoning="),
        ({"votes": 4}, "votes= without do_sample=True"),
        ({"votes": 4, "do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2 with"),
        ({"reasoning": "prob"}, "'prob' is neither a stop policy .*probe"),
        ({"reasoning": {"probe": {"chunks": 3}}}, "'probe' has no setting 'chunks'"),
        ({"votes": "most"}, "votes='most' is unknown: give a number of chains"),
        ({"tokenizer": None}, "reasoning needs the tokenizer"),
        ({"max_new_tokens": 3}, "max_new_tokens=3 leaves no room"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(model, tokenizer, ids, given, words):
    with pytest.raises(DeliberateError, match=words):
        reasoned(model, given.pop("tokenizer", tokenizer), ids, **{"reasoning": "probe"} | given)


def test_a_model_without_a_known_mark_needs_its_tags(model, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(model.base.config, "answer_mark", None)
    named = r"give its tags.* --reasoning-tags to `generate` or a server"
    with pytest.raises(DeliberateError, match=named):
        reasoned(model, tokenizer, ids)
    made = reasoned(model, tokenizer, ids, {"tags": ("", "\n#### ")})
    assert made.chains[0].answer.isdigit()


def test_settings_are_read_in_each_of_their_forms():
    whole = ReasoningSettings({"probe": {"chunk": 8}}, budget=9)
    assert ReasoningSettings.of({"probe": {"chunk": 8}, "budget": 9}) == whole
    assert ReasoningSettings.of(whole) is whole
    assert ReasoningSettings.of("none").policies == {}
    assert "wait" in ReasoningSettings(suppressed=True).suppressed
    assert vote_rule(3) == FixedVotes(3)
    assert vote_rule("adaptive") == AdaptiveConsistency()
    assert vote_rule(FixedVotes(2)) == FixedVotes(2)
    assert [kept_for_answer(limit) for limit in (1, 8, 40, 400)] == [1, 2, 10, 16]
