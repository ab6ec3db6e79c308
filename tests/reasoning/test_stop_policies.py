"""Stop policies on scripted chains: probes that agree, sure trial answers, chains given up."""

from __future__ import annotations

import pytest

from deliberate.reasoning.answer_probes import AnswerProbes, AnswerProbeSettings
from deliberate.reasoning.registry import STOP_POLICIES, chain_policy
from deliberate.reasoning.stop_policy import Continue, Force, Probe, Stop, Together, Trial
from deliberate.reasoning.trial_answers import trial_confidence
from deliberate.utils.errors import DeliberateError

WORDS: dict[str, int] = {}


def encode(text):
    """One id a word; a blank before it makes another word, as in most tokenizers."""
    return [WORDS.setdefault(text, len(WORDS) + 1000)]


def replay(policy, tokens, answers):
    """Walks a scripted chain; returns its length at the stop and the places of its probes."""
    answers, probes = iter(answers), []
    for length in range(1, len(tokens) + 1):
        if not policy.due(tokens[:length]):
            continue
        action = policy.on_step(tokens[:length])
        if isinstance(action, Probe):
            probes.append(length)
            action = policy.on_probe(next(answers))
        if isinstance(action, Stop):
            return length, probes, action
    return None, probes, None


def answered(*texts):
    return [Trial(text) for text in texts]


def test_the_defaults_are_the_sources_constants():
    probe = STOP_POLICIES["probe"].settings()
    assert (probe.agree, probe.chunk, probe.answer_tokens) == (3, 64, 20)
    deer = STOP_POLICIES["deer"].settings()
    assert (deer.confidence, deer.trials) == (0.95, 10)


@pytest.mark.parametrize(
    ("answers", "stop"),
    [
        (["7", "7", "7", "7"], 192),
        (["7", "8", "8", "8"], 256),
        (["7", "7 ", " 7.", "9"], 192),
        (["", "", "", ""], None),  # an empty answer agrees with nothing
        (["7 wait", "7 wait", "7 wait", "7"], None),
        (["7 No", "7 No", "7 No", "7"], None),
        (["now 7", "now 7", "now 7", "7"], 192),  # "no" is not in "now"
        (["7", "7", "8", "7"], None),
    ],
)
def test_probes_stop_where_the_last_three_agree_without_a_word_of_doubt(answers, stop):
    policy = chain_policy({"probe": None}, encode)
    length, probes, _ = replay(policy, list(range(256)), answered(*answers))
    assert length == stop
    assert probes == [64 * n for n in range(1, 1 + (stop or 256) // 64)]


def test_probes_compare_answers_as_the_grader_does():
    settings = AnswerProbeSettings(agree=2, chunk=4)
    policy = AnswerProbes(settings, same=lambda one, other: float(one) == float(other))
    assert replay(policy, list(range(20)), answered("3", "0.5", ".50"))[0] == 12


def test_confidence_counts_from_the_second_token():
    assert trial_confidence([0.1, 0.9, 1.0]) == pytest.approx(0.95)
    assert trial_confidence([0.7]) == 0.7
    assert trial_confidence([]) == 0.0


def test_a_trial_is_made_at_each_switch_word_and_stops_above_the_limit():
    (wait,), (other,) = encode("Wait"), encode(" Hmm")
    policy = chain_policy({"deer": None}, encode)
    tokens = [1, 2, wait, 3, 4, other, 5, wait, 6]
    trials = [
        Trial("7", (5, 5), (0.2, 0.95)),  # not above
        Trial(" ", (5, 5), (1.0, 1.0)),  # empty
        Trial("8", (5, 5), (0.2, 0.96)),
    ]
    length, probes, action = replay(policy, tokens, trials)
    assert (length, probes) == (8, [3, 6, 8]) and "0.960" in action.reason


def test_at_most_ten_trials_are_made():
    (wait,) = encode("Wait")
    policy = chain_policy({"deer": None}, encode)
    _, probes, _ = replay(policy, [1, wait] * 20, [Trial("7", (5,), (0.5,))] * 20)
    assert len(probes) == 10


def test_a_chain_that_repeats_itself_is_given_up_and_marked():
    policy = chain_policy({"give_up": {"window": 32, "every": 8}}, encode)
    fresh = list(range(100, 180))
    length, _, action = replay(policy, fresh + [1, 2, 3] * 30, [])
    assert action.gave_up and 96 < length <= 120
    assert replay(policy, list(range(400)), [])[0] is None


def test_together_the_first_to_stop_ends_the_chain_and_probes_go_to_who_asked():
    policy = chain_policy(
        {"give_up": {"window": 16, "every": 4}, "probe": {"chunk": 4, "agree": 2}}, encode
    )
    length, probes, action = replay(policy, list(range(50)), answered("1", "2", "2"))
    assert (length, probes, action.gave_up) == (12, [4, 8, 12], False)

    class Forces:
        def due(self, tokens):
            return len(tokens) == 4

        def on_step(self, tokens):
            return Force((9,))

        def on_probe(self, trial):
            raise AssertionError("it asked for none")

    both = Together([chain_policy({"probe": {"chunk": 4}}, encode), Forces()])
    assert both.on_step([1, 2, 3, 4]) == Force((9,))
    assert both.on_probe(Trial("1")) == Continue()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (
            {"prob": None},
            "reasoning policy 'prob' is unknown: use probe, deer, bands, cut, give_up",
        ),
        ({"probe": {"k": 3}}, "has no setting 'k'; it has agree, chunk"),
        ({"probe": {"chunk": 0}}, "chunk=0 must be a whole number of at least 1"),
        ({"probe": {"doubt": ["hold on"]}}, "doubt has 'hold on': give single words"),
        ({"deer": {"confidence": 1.0}}, r"confidence=1.0 must be in \(0, 1\)"),
        ({"deer": {"switches": []}}, "give at least one word"),
        ({"give_up": {"share": 0}}, r"share=0 must be in \(0, 1\]"),
        ({"give_up": {"window": 7}}, "window=7 must be"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(chosen, words):
    with pytest.raises(DeliberateError, match=words):
        chain_policy(chosen, encode)
