"""Settings of reasoning and votes of another kind than theirs are refused by name, in one line."""

from __future__ import annotations

import pytest

from deliberate.api.reasoned import ReasonedDecoding
from deliberate.config import Fidelity
from deliberate.reasoning.calibrated_bands import load_calibration
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_walks import LookPlaces
from deliberate.reasoning.recorded_chains import ProbePlaces
from deliberate.reasoning.registry import STOP_POLICIES
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.settings import ReasoningSettings, VoteGroup, vote_rule
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import VOTE_RULES, FixedVotes
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"suppressed": 5}, "suppressed=5 must be a list of words, or true"),
        ({"suppressed": "wait"}, "suppressed='wait' must be a list of words"),
        ({"extensions": 1, "extension": 5}, "extension=5: give a word"),
        ({"lead_in": 5}, "lead_in=5: give a text"),
        ({"tags": 5}, "tags=5: give an opening and a closing tag"),
        ({"policies": 5}, "policies=5: give settings by policy"),
        ({"probe": 5}, "reasoning policy 'probe': 5 is no mapping"),
        ({"probe": {"chunk": "8"}}, "chunk='8' must be a whole number"),
        ({"probe": {"doubt": 3}}, "reasoning policy 'probe': doubt=3 must be a list of words"),
        ({"deer": {"switches": [3]}}, "reasoning policy 'deer': switches=[3] must be a list"),
        ({"deer": {"confidence": "x"}}, "confidence='x' must be a number, e.g. 0.95"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(given, named):
    with pytest.raises(DeliberateError) as found:
        ReasoningSettings.of(given)
    assert named in str(found.value)


@pytest.mark.parametrize("value", [None, True, -3, "x", [1], {"a": 1}, 2.5])
def test_no_value_of_any_setting_ends_in_another_error(value):
    for registry, of in ((STOP_POLICIES, ReasoningSettings.of), (VOTE_RULES, vote_rule)):
        for name, one in registry.items():
            kind = getattr(one, "settings", one)
            for key in kind.__dataclass_fields__:
                try:
                    of({name: {key: value}})
                except DeliberateError as error:
                    assert "\n" not in str(error)


def test_a_vote_names_its_number_and_takes_settings_by_name():
    with pytest.raises(DeliberateError, match="votes=0 must be a whole number of at least 1"):
        vote_rule(0)
    with pytest.raises(DeliberateError, match="give a number of chains, or one of fixed"):
        VoteGroup.of("1.5")
    with pytest.raises(DeliberateError, match="vote rule 'adaptive': 5 is no mapping"):
        VoteGroup.of({"adaptive": 5})


def test_a_calibration_that_is_no_path_is_refused():
    with pytest.raises(DeliberateError, match="bands calibration=5: give its file or folder"):
        load_calibration(5)


@pytest.mark.parametrize(("name", "value"), [("drafts", "int4"), ("kv_storage", "int8")])
def test_what_a_shared_cache_excludes_is_refused_in_terms_of_generate(name, value):
    class Model:
        fidelity = Fidelity.EXACT

    with pytest.raises(DeliberateError, match=f"{name}='{value}' with reasoning=: .*leave {name}"):
        ReasonedDecoding(Model(), "probe", None, {name: value}, {})


def test_a_vote_with_a_budget_makes_no_more_requests_than_it_has_tokens():
    class Runner:
        def least(self, budget):
            return 10

        def run(self, requests):
            return [ChainResult([1] * 40, answer="7") for _ in requests]

    made = []

    def chain(number):
        made.append(number)
        return ChainRequest([1], BudgetSettings(max_new_tokens=40))

    result = run_votes(Runner(), chain, FixedVotes(100_000), max_tokens=90)
    assert result.over_budget and len(result.chains) == 2
    assert len(made) <= 90 + 10


@pytest.mark.parametrize("value", [5, "\n", [""], None])
def test_places_of_probes_are_lists_of_texts(value):
    for kind in (ProbePlaces, LookPlaces):
        with pytest.raises(DeliberateError, match=r"boundaries=.* must be a list of texts"):
            kind(boundaries=value)
    assert LookPlaces(boundaries=["\n"]).boundaries == ("\n",)


def test_a_section_that_is_a_single_value_is_refused_by_name():
    with pytest.raises(DeliberateError, match="places=5 must be settings by name"):
        all_at_least({"places": 5}, {"places.chunk": 1})
