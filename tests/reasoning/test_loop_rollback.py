"""Chains that repeat themselves are rolled back to where the loop began, and go on another way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.sampler import TokenChooser
from deliberate.reasoning.chain_replay import replay
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.loop_rollback import LoopRollback, LoopRollbackSettings, loop_begin
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.recorded_chains import RecordedChain
from deliberate.reasoning.registry import chain_policy
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Continue, Probe, Rollback, Stop, Together
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.utils.errors import DeliberateError

MARKS = ReasoningMarks(closing=(2,), answer=(7,))
LOOPS = {"window": 16, "gram": 3, "every": 4, "share": 0.5, "most": 3}


@pytest.mark.parametrize(
    ("tokens", "begin"),
    [
        ([1, 2, 3, 4, 5, 6], None),
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3], 7),  # the first n-gram that stood before: 1 2 3
        ([1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9], None),  # it moved on by itself
        ([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5], 8),  # with a new word in between
    ],
)
def test_a_loop_begins_where_all_that_follows_stood_before(tokens, begin):
    assert loop_begin(tokens, 3) == begin


@given(
    st.lists(st.integers(0, 5), min_size=4, max_size=30),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.integers(2, 4),
)
def test_what_is_avoided_stood_before_and_removing_the_loop_keeps_its_first_round(head, loop, gram):
    tokens = head + loop * (2 + 2 * gram)
    begin = loop_begin(tokens, gram)
    assert begin is not None and begin < len(tokens)
    run = tokens[begin - gram + 1 : begin + 1]
    places = range(gram - 1, begin)
    assert any(tokens[end - gram + 1 : end + 1] == run for end in places)
    assert begin <= len(head) + len(loop) + gram  # no later than in the second round


def test_the_rule_acts_where_the_window_repeats_and_so_often_at_most():
    policy = LoopRollback(LoopRollbackSettings(**LOOPS))
    looping = [1, 2, 3, 4] * 4
    for left in (2, 1, 0):
        assert policy.due(looping)
        assert policy.on_step(looping) == Rollback(10, (1, 2, 3))
        assert policy._left == left
    assert not policy.due(looping)
    fresh = LoopRollback(LoopRollbackSettings(**LOOPS))
    assert fresh.on_step(list(range(16))) == Continue()
    assert not fresh.due(looping[:12]) and not fresh.due([*looping, 1])
    assert fresh.quiet(looping).count == 3


def test_taking_back_comes_after_a_stop_and_before_a_probe():
    class Acts:
        def __init__(self, action):
            self.action = action

        def due(self, tokens):
            return True

        def on_step(self, tokens):
            return self.action

    back, probe, stop = Acts(Rollback(1, (1,))), Acts(Probe(4)), Acts(Stop("x"))
    assert Together([probe, back]).on_step([1]) == back.action
    assert Together([back, stop]).on_step([1]) == stop.action


def test_the_rule_is_chosen_by_its_name():
    policy = chain_policy({"rollback": LOOPS}, lambda text: [])
    assert isinstance(policy, LoopRollback) and policy.settings == LoopRollbackSettings(**LOOPS)


def test_a_chain_that_would_be_rolled_back_cannot_be_replayed():
    chain = RecordedChain("a", "7", tokens=(1, 2, 3, 4) * 8)
    with pytest.raises(DeliberateError, match="rolls some back changes the chain"):
        replay(LoopRollback(LoopRollbackSettings(**LOOPS)), chain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 0.0}, "share=0.0"),
        ({"gram": 1}, "gram=1"),
        ({"window": 5}, "window=5"),
        ({"most": 0}, "most=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, words):
    with pytest.raises(DeliberateError, match=words):
        LoopRollbackSettings(**LOOPS | change)
    with pytest.raises(DeliberateError, match="remove a token"):
        Rollback(0, (1,))


@pytest.fixture(scope="module")
def runner() -> ChainRunner:
    model = AdaptiveModel(tiny_model("llama"), executor="generic")
    return ChainRunner(
        model.engine(max_running=4), MARKS, lambda ids: " ".join(map(str, ids)), end_tokens=[3]
    )


class Back:
    """Takes the chain back by 8 tokens at its 20th, twice, and avoids what stood there."""

    def __init__(self):
        self.avoided = []

    def due(self, tokens):
        return len(tokens) == 20 and len(self.avoided) < 2

    def on_step(self, tokens):
        self.avoided.append(tuple(tokens[10:13]))
        return Rollback(8, self.avoided[-1])

    def on_probe(self, trial):
        return Continue()


def request(number, policy, seed=None):
    ids = random_ids(6, seed=number)[0].tolist()

    def sampling(start):
        return TokenChooser(sample=True, seed=1000 * seed + start)

    return ChainRequest(
        ids, BudgetSettings(60, 50, answer=2), policy, sampling=None if seed is None else sampling
    )


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("number", [0, 3])
def test_a_chain_rolled_back_keeps_its_beginning_and_its_budget(runner, number, seed):
    (plain,) = runner.run([request(number, None, seed)])
    policy = Back()
    (other,) = runner.run([request(number, policy, seed)])
    assert policy.avoided and other.rolled_back == 8 * len(policy.avoided)
    assert other.tokens[:12] == plain.tokens[:12]
    assert other.tokens[12] not in {run[-1] for run in policy.avoided}
    held = [tuple(other.tokens[i : i + 3]) for i in range(other.reasoning_tokens - 2)]
    assert not set(policy.avoided) & set(held)
    assert len(other.tokens) <= 60 and other.reasoning_tokens <= 50 and other.answer


def test_chains_are_rolled_back_alike_whatever_runs_beside_them(runner):
    alone = [runner.run([request(number, Back())])[0].tokens for number in range(3)]
    together = runner.run([request(number, Back()) for number in range(3)])
    assert [one.tokens for one in together] == alone
