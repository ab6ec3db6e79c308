"""A round of self-evolution: from traffic to a certified policy, each step in the registry."""

from __future__ import annotations

import pytest
import torch
from versioned_server import random_prompt

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.lifecycle.evolution import EvolutionSettings, evolve
from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.traffic import TRAFFIC_NAME, Exchange, TrafficLog
from deliberate.lifecycle.version import Source, State
from deliberate.utils.errors import DeliberateError

QUESTION = "Question: {} has {} apples and buys {} more. How many apples does {} have?\nAnswer:"


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel.from_pretrained("tiny")


@pytest.fixture(scope="module")
def traffic(model):
    """Full-depth answers to 120 prompts, the last marked as not of full depth."""
    tokenizer = checkpoint.load_tokenizer("tiny")
    names = ("Tom", "Anna", "Sam", "Mia")
    made = []
    for number in range(120):
        name = names[number % 4]
        ids = tokenizer.encode(QUESTION.format(name, number % 10, 1 + number // 10, name))
        ids = random_prompt(number) if number % 2 else ids  # on which exits disagree more often
        out = model.generate(torch.tensor([ids]), max_new_tokens=24, fidelity="dense")
        made.append(Exchange(tuple(ids), tuple(out[0, len(ids) :].tolist()), 24, True))
    made[-1] = Exchange(made[-1].prompt, (5,), 24, False)
    return made


@pytest.fixture
def registry(tmp_path):
    made = VersionRegistry(tmp_path)
    made.propose("weights", Source("tiny"), reason="r", who="w")
    made.move(1, State.LIVE, reason="r", who="w")
    return made


def test_a_round_proposes_a_certified_policy_that_replays_cheaper(model, traffic, registry) -> None:
    done = evolve(model, traffic, registry, EvolutionSettings(epsilon=0.1, delta=0.1))
    assert done.version.state is State.SHADOW, done.steps
    proposed, shadow = registry.history(2)
    assert proposed.state is State.PROPOSED and proposed.figures["answers"] == 120
    figures = shadow.figures
    assert figures["gain"] > 0.02 and figures["risk"] <= 0.1 and figures["live_risk"] == 0.0
    assert figures["certificate"]["n"] == 60
    source = done.version.source
    made = Calibration.load(source.calibration)
    (certificate,) = made.certificates
    made.check_certificate(certificate)
    assert source.thresholds == certificate.thresholds and source.fidelity == "threshold"
    assert certificate.conditions["max_new_tokens"] == 24
    assert len(done.steps) == 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (EvolutionSettings(epsilon=0.0001), "no certificate for epsilon=0.0001"),
        (EvolutionSettings(epsilon=0.1, least_gain=0.99), "at least 99.0% is needed"),
    ],
)
def test_a_policy_that_fails_is_rolled_back_with_the_reason(
    model, traffic, registry, settings, reason
) -> None:
    done = evolve(model, traffic, registry, settings)
    assert done.version.state is State.ROLLED_BACK and reason in done.steps[-1]
    assert reason in registry.history(2)[-1].reason


def test_too_little_traffic_is_an_error_and_records_nothing(model, traffic, registry) -> None:
    for few in (traffic[:1], traffic[:6]):
        with pytest.raises(DeliberateError, match="serve more greedy requests"):
            evolve(model, few, registry)
    assert [one.id for one in registry.versions()] == [1]


def test_traffic_keeps_the_newest_of_every_prompt_for_its_owner_only(tmp_path) -> None:
    log = TrafficLog(tmp_path, most=3)
    for number in (1, 2, 3, 4, 4):
        log.note(Exchange((number,), (number, 7), 9, dense=number != 3))
    log.close()
    found = TrafficLog(tmp_path).exchanges()
    assert found == [Exchange((3,), (3, 7), 9, False), Exchange((4,), (4, 7), 9, True)]
    assert (tmp_path / TRAFFIC_NAME).stat().st_mode & 0o077 == 0
    with pytest.raises(DeliberateError, match="at least 1"):
        TrafficLog(tmp_path, most=0)
