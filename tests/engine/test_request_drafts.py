"""Drafts that come with a request, and tokens that end an answer later on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.sequence import LaterEnds
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

SPECS = {
    "dense": DecodingSpec(fidelity="dense", gate=False),
    "exact": DecodingSpec(fidelity="exact", thresholds=0.05, online=False, gate=False),
    "lookup": DecodingSpec(fidelity="exact", lookup_tokens=4, gate=False),
    "threshold": DecodingSpec(fidelity="threshold", thresholds=0.05, gate=False),
}
PROMPT = [token % 24 for token in random_ids(17, seed=5)[0].tolist()]
NEW = 24


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", vocab_size=24), executor="auto")


def ask(spec, new=NEW, **how) -> Request:
    return Request(PROMPT, new, spec, **{"end_tokens": (), **how})


def answers(engine: Engine, *requests: Request) -> list[list[int]]:
    made: dict[int, list[int]] = {engine.add(one): [] for one in requests}
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    return list(made.values())


@pytest.mark.parametrize("name", ["dense", "exact"])
def test_drafts_that_are_right_are_a_request_s_first_tokens_in_one_pass(llama, name):
    spec, engine = SPECS[name], llama.engine(max_running=1)
    (whole,) = answers(engine, ask(spec))
    steps = engine.stats().steps
    (made,) = answers(engine, ask(spec, 5, drafts=whole[:4], confidences=True))
    assert made == whole[:5]
    assert engine.stats().steps == steps + 1


@pytest.mark.parametrize("name", ["dense", "exact", "lookup"])
@pytest.mark.parametrize("right", [0, 2, 5])
def test_drafts_change_no_token_whether_they_are_right_or_wrong(llama, name, right):
    spec, engine = SPECS[name], llama.engine(max_running=2)
    (whole,) = answers(engine, ask(spec))
    wrong = [(token + 1) % 24 for token in whole[right:8]]
    own = ask(spec, drafts=[*whole[:right], *wrong])
    assert answers(engine, own) == [whole]
    assert answers(engine, own, ask(spec)) == [whole, whole]


def test_an_answer_ends_where_a_draft_ends_it(llama):
    spec, engine = SPECS["dense"], llama.engine(max_running=1)
    (whole,) = answers(engine, ask(spec))
    end = whole[3]
    (made,) = answers(engine, ask(spec, drafts=whole[:8], end_tokens=[end]))
    assert made == whole[: whole.index(end) + 1]
    (made,) = answers(engine, ask(spec, 3, drafts=whole[:8]))
    assert made == whole[:3]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("dense", {"sampling": TokenChooser(sample=True)}),
        ("dense", {"top_logprobs": 1}),
        ("threshold", {}),
    ],
)
def test_drafts_of_tokens_that_are_not_full_depth_s_most_likely_are_refused(llama, name, changes):
    with pytest.raises(DeliberateError, match="leave drafts out"):
        llama.engine().add(ask(SPECS[name], drafts=[3], **changes))
    with pytest.raises(DeliberateError, match="drafts has -1"):
        ask(SPECS["dense"], drafts=[-1])
    with pytest.raises(DeliberateError, match="later_ends"):
        ask(SPECS["dense"], later_ends=(3, {4}))


@given(
    name=st.sampled_from(sorted(SPECS)),
    after=st.integers(0, NEW),
    ends=st.frozensets(st.integers(0, 23), min_size=1, max_size=4),
    beside=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_later_ends_end_an_answer_from_their_token_on_and_not_before(
    llama, name, after, ends, beside
):
    spec = SPECS[name]
    others = [ask(spec, 30)] if beside else []
    engine = llama.engine(max_running=2)
    whole = answers(engine, ask(spec), *others)[0]
    later = LaterEnds(after, ends)
    made = answers(engine, ask(spec, later_ends=later), *others)[0]
    end = next((i for i, token in enumerate(whole) if i >= after and token in ends), NEW)
    assert made == whole[: end + 1]
