"""Calibrated bands: probabilities that hold, certificates that are kept, and doubt that goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom
from synthetic_chains import LINE, synthetic_chains
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.reasoning.calibrated_bands import CalibratedBands, CalibratedBandsSettings
from deliberate.reasoning.chain_calibration import ChainCalibration, fit_curves
from deliberate.reasoning.chain_certificates import (
    THRESHOLDS,
    certify_chains,
    chain_losses,
    resample_certificates,
)
from deliberate.reasoning.chain_replay import replay
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.chain_walks import LookPlaces, walk
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.recorded_chains import ChainSet, RecordingHeader
from deliberate.reasoning.registry import STOP_POLICIES, chain_policy
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Continue, Probe, Stop, Trial
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.utils.errors import DeliberateError

PLACES = LookPlaces(chunk=8, boundaries=("\n",))
ENDINGS = [(LINE,)]
EPSILON, DELTA = 0.1, 0.1


def encode(text):
    return [LINE]


def walks_of(chains):
    return [walk(chain, PLACES, ENDINGS) for chain in chains]


@pytest.fixture(scope="module")
def fitted() -> ChainCalibration:
    return fit_curves(walks_of(synthetic_chains(400, seed=1)), PLACES)


@pytest.fixture(scope="module")
def testing() -> ChainSet:
    header = RecordingHeader(weights="w", exits="e", conditions={"task": "chains"})
    return ChainSet(header, tuple(synthetic_chains(300, seed=2)))


def test_probabilities_are_calibrated_on_fresh_chains(fitted):
    looks = [look for one in walks_of(synthetic_chains(2000, seed=3)) for look in one.looks]
    found = np.asarray([fitted.probability(look.confidence, look.streak) for look in looks])
    same = np.asarray([look.same for look in looks])
    for low in (0.0, 0.2, 0.5, 0.8, 0.95):
        inside = (found >= low) & (found < low + 0.2)
        if inside.sum() > 200:
            assert same[inside].mean() == pytest.approx(found[inside].mean(), abs=0.06)
    # Two equal answers in a row say more than one.
    assert fitted.probability(0.5, 2) > fitted.probability(0.5, 1)
    assert fitted.probability(0.99, 0) == 0.0


def test_no_more_certificates_than_delta_are_violated_and_the_naive_rule_violates_many(fitted):
    pool = walks_of(synthetic_chains(3000, seed=4))
    losses = chain_losses(fitted, pool, THRESHOLDS)
    done = resample_certificates(losses, 200, epsilon=0.15, delta=DELTA, resamples=1000)
    most = int(binom.ppf(0.999, 1000, DELTA))
    assert done.certified > 500
    assert done.violated <= most
    assert done.naive > most


def test_the_losses_are_those_of_the_replayed_rule(fitted, testing):
    for threshold in (0.95, 0.6):
        settings = {"calibration": fitted, "answer": threshold, "go_on": 0.3}
        lost, changed = [], []
        for chain in testing.chains[:60]:
            done = replay(chain_policy({"bands": settings}, encode), chain)
            lost.append(chain.answer == chain.expected and done.answer != chain.expected)
            changed.append(done.answer != chain.answer)
        walks = walks_of(testing.chains[:60])
        assert chain_losses(fitted, walks, [threshold])[0].tolist() == lost
        assert chain_losses(fitted, walks, [threshold], "changed")[0].tolist() == changed


def test_a_certificate_is_for_its_own_conditions(fitted, testing, tmp_path):
    walks = walks_of(testing.chains)
    _, certificate = certify_chains(fitted, testing, walks, epsilon=EPSILON, delta=DELTA)
    assert certificate is not None and certificate.observed < EPSILON
    made = replace(fitted, certificates=(certificate,))
    assert ChainCalibration.load(made.save(tmp_path)) == made
    assert ChainCalibration.load(tmp_path) == made
    run = {"weights": "w", "exits": "e", "task": "chains", "loss": "accuracy"}
    asked = {"calibration": tmp_path, "epsilon": EPSILON, "delta": DELTA}
    policy = CalibratedBands(CalibratedBandsSettings(**asked, conditions=run), encode)
    assert policy.bands.answer == certificate.lambda_
    for change, words in [
        ({"task": "gsm8k"}, "for task='chains', not 'gsm8k'"),
        ({"weights": "other"}, "for other weights"),
        ({"exits": "other"}, "for other exits"),
    ]:
        with pytest.raises(DeliberateError, match=words):
            CalibratedBands(CalibratedBandsSettings(**asked, conditions=run | change), encode)
    with pytest.raises(DeliberateError, match=r"no certificate of chains for epsilon=0.01"):
        CalibratedBands(
            CalibratedBandsSettings(**asked | {"epsilon": 0.01}, conditions=run), encode
        )
    with pytest.raises(DeliberateError, match="need conditions= of the request"):
        CalibratedBands(CalibratedBandsSettings(**asked), encode)


def test_an_edited_calibration_is_refused(fitted, testing, tmp_path):
    _, certificate = certify_chains(
        fitted, testing, walks_of(testing.chains), epsilon=EPSILON, delta=DELTA
    )
    path = replace(fitted, certificates=(certificate,)).save(tmp_path)
    raw = json.loads(path.read_text())
    raw["curves"][0]["probabilities"][-1] = 0.999999
    path.write_text(json.dumps(raw))
    with pytest.raises(DeliberateError, match="for other policy"):
        ChainCalibration.load(path)
    path.write_text("{}")
    with pytest.raises(DeliberateError, match="has the keys"):
        ChainCalibration.load(path)


def test_two_chains_of_one_problem_do_not_test(fitted, testing):
    twice = replace(testing, chains=testing.chains[:2] + testing.chains[:1])
    with pytest.raises(DeliberateError, match="not independent"):
        certify_chains(fitted, twice, walks_of(twice.chains), epsilon=EPSILON, delta=DELTA)


def test_the_bands_look_at_the_ends_of_lines_and_act_by_probability(fitted):
    settings = STOP_POLICIES["bands"].settings(calibration=fitted)
    assert (settings.answer, settings.go_on) == (0.95, 0.80)
    policy = CalibratedBands(settings, encode)
    line = [1] * 7 + [LINE]
    assert not policy.due(line[:-1]) and not policy.due([1] * 8) and policy.due(line)
    assert isinstance(policy.on_step(line), Probe)
    assert not policy.due([*line, LINE])  # too near
    assert policy.on_probe(Trial("101", (), (0.25,))) == Continue()
    assert policy.doubtful and policy.probabilities[-1] < 0.8
    action = None
    for _ in range(3):
        action = policy.on_probe(Trial("7", (), (0.95,)))
    assert isinstance(action, Stop) and not policy.doubtful
    assert not chain_losses(fitted, walks_of(synthetic_chains(9)), [2.0], "changed").any()


class _Doubt:
    """Looks once, at the first token, and stays in doubt or does not."""

    def __init__(self, doubtful):
        self.doubtful = doubtful

    def due(self, tokens):
        return len(tokens) == 1

    def on_step(self, tokens):
        return Continue()

    def on_probe(self, trial):
        return Continue()


def test_the_end_of_a_chain_is_put_off_in_doubt_alone():
    model = AdaptiveModel(tiny_model("llama"), executor="generic")
    runner = ChainRunner(
        model.engine(max_running=2),
        ReasoningMarks(closing=(2,)),
        lambda tokens: " ".join(map(str, tokens)),
        end_tokens=[3],
    )
    extended = {True: 0, False: 0}
    for seed in range(8):
        ids = random_ids(6, seed=seed)[0].tolist()
        budget = BudgetSettings(40, 30, answer=1, extensions=30, extension=(5,))
        plain = BudgetSettings(40, 30, answer=1)
        ended = runner.run([ChainRequest(ids, plain)])[0].reasoning_tokens < 30
        for doubtful in (True, False):
            (result,) = runner.run([ChainRequest(ids, budget, _Doubt(doubtful))])
            extended[doubtful] += ended and result.reasoning_tokens >= 30
    assert extended[True] > 0 and extended[False] == 0
