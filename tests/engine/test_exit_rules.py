"""Exit rules by name: what they are in decoding, and that a replay decides the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.baselines import policy_exits, usual_rules
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.exit_traces import Recording
from deliberate.engine.exit_policy import ExitAnswer, ExitPolicy, ExitReading, FixedPolicy
from deliberate.engine.exit_rules import EXIT_RULES, RandomPolicy, policy_named
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError

NEW = 24


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    base = tiny_model("llama", layers=6)
    with torch.no_grad():  # states that turn slowly, so that exits agree often but not always
        for layer in base.model.layers:
            layer.mlp.down_proj.weight.mul_(0.3)
            layer.self_attn.o_proj.weight.mul_(0.3)
    exits = ExitConfig.build(6, [1, 2, 4], max_pending=64)
    return AdaptiveModel(base, exits).eval()


def decode(model: AdaptiveModel, exit_policy, seed: int = 0, **settings):
    settings = {"fidelity": "threshold", "max_new_tokens": NEW} | settings
    return model.generate(
        random_ids(5, seed=seed), exit_policy=exit_policy, return_dict_in_generate=True, **settings
    )


def recorded(model: AdaptiveModel, sequence: torch.Tensor) -> Recording:
    """The exits on a text that exits may have shortened: deferred layers leave no trace in it."""
    return record_sequences(model, [sequence.tolist()], [5])


def middle(model: AdaptiveModel, name: str) -> float:
    """A setting at which some tokens exit at each exit and some at none."""
    recording = recorded(model, decode(model, FixedPolicy((0.02,) * 3)).sequences[0])
    if name == "similarity":
        return 1.0 - float(np.median(recording.similarities[:, 1:]))
    level = float(np.median(recording.scores))
    return 1.0 - (level - 0.05 if name == "decaying" else level)


@pytest.mark.parametrize("name", ["constant", "rising", "decaying", "patience", "similarity"])
def test_a_replay_on_recorded_traces_decides_as_decoding_does(model, name):
    setting = 2 if name == "patience" else middle(model, name)
    layers = [*model.exit_config.layers, 6]
    exited = []
    for seed in range(3):
        out = decode(model, {name: setting}, seed)
        replayed = policy_exits(recorded(model, out.sequences[0]), policy_named({name: setting}, 3))
        # The first token is that of the prompt's pass, through all layers.
        assert out.trace.exit_layers[1:] == [layers[k] for k in replayed[1:]]
        exited += out.trace.exit_layers[1:]
    assert len(set(exited)) > 1, "some tokens exit and some do not"


def test_fixed_depth_and_entropy_by_name(model):
    assert set(decode(model, {"fixed_depth": 1}).trace.exit_layers[1:]) == {2}
    assert set(decode(model, {"fixed_depth": 3}).trace.exit_layers) == {6}
    with pytest.raises(DeliberateError, match="measure is 'max_prob', the rule is for 'entropy'"):
        decode(model, "entropy")


@pytest.mark.parametrize("name", [one for one in EXIT_RULES if one != "entropy"])
@pytest.mark.parametrize("fidelity", ["exact", "threshold"])
def test_every_rule_decodes_by_its_name_and_exact_mode_stays_exact(model, name, fidelity):
    out = decode(model, name, fidelity=fidelity, online=False)
    assert len(out.sequences[0]) == 5 + NEW
    if fidelity == "exact":
        dense = model.generate(random_ids(5), fidelity="dense", max_new_tokens=NEW)
        assert out.sequences.tolist() == dense.tolist()


@pytest.mark.parametrize("name", list(EXIT_RULES))
@pytest.mark.parametrize("exits", [1, 3])
def test_every_setting_that_is_compared_is_allowed_and_makes_a_policy(name, exits):
    rule = EXIT_RULES[name]
    for setting in (*rule.settings(exits), rule.default):
        policy = policy_named({name: setting}, exits)
        assert isinstance(policy, ExitPolicy)
        if policy.thresholds is not None:
            assert len(policy.thresholds) == exits


def test_random_exits_have_on_average_the_shares_of_their_rule():
    policy, counts = RandomPolicy(0.3, 3, seed=1), np.zeros(4)
    for _ in range(4000):
        policy.on_step(0.0, 1)
        row = list(policy.thresholds)
        counts[row.index(0.0) if 0.0 in row else 3] += 1
    np.testing.assert_allclose(counts / 4000, EXIT_RULES["random"].shares(0.3, 3), atol=0.03)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("nonsense", "exit_policy='nonsense': give one of constant, rising"),
        ({"patience": 2, "random": 0.5}, "give one of"),
        ({}, "give one of"),
        ({"patience": 0}, "exits in a row that predict one token must be a whole number from 1"),
        ({"patience": 2.5}, "must be a whole number from 1 to 4"),
        ({"patience": 5}, "must be a whole number from 1 to 4"),
        ({"patience": True}, "must be a whole number"),
        ({"constant": 1.5}, "1 - the threshold must be a number from 0 to 1"),
        ({"constant": float("nan")}, "must be a number from 0 to 1"),
        ({"similarity": "high"}, "must be a number from 0 to 2"),
    ],
)
def test_what_is_no_rule_or_no_setting_of_it_is_refused_in_one_line(model, wanted, words):
    with pytest.raises(DeliberateError, match=words) as caught:
        decode(model, wanted)
    assert "\n" not in str(caught.value)


def test_a_policy_that_changes_by_steps_and_sees_tokens_cannot_be_replayed(model):
    class Stepping(ExitPolicy):
        def decide(self, reading):
            return [True] * len(reading)

    recording = recorded(model, random_ids(9)[0])
    with pytest.raises(DeliberateError, match="set `constant`"):
        policy_exits(recording, Stepping())


def test_the_documents_policy_decodes_and_is_compared_as_it_is_written(model, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.split("## An exit policy", 1)[1].split("\n## ", 1)[0]
    monkeypatch.setattr("deliberate.engine.exit_rules.EXIT_RULES", EXIT_RULES.copy())
    names: dict = {"model": model, "ids": random_ids(5)}
    commands = re.findall(r"^    (model\.generate\(.*\))$", section, re.M)
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == len(commands) == 2
    outputs = []
    for block, command in zip(blocks, commands, strict=True):
        exec(block, names)  # as a reader of the page would
        outputs.append(eval(command, names).tolist())
    assert outputs[0] == outputs[1]
    assert len(decode(model, names["SurePair"](0.0)).trace.records) == NEW
    recording = recorded(model, decode(model, names["SurePair"](0.0)).sequences[0])
    monkeypatch.setattr("deliberate.calibration.baselines.EXIT_RULES", names["EXIT_RULES"])
    assert "two exits agree and are sure" in {rule.name for rule in usual_rules(recording)}
    # At 0 it is patience of two exits.
    pair = policy_exits(recording, names["SurePair"](0.0)).tolist()
    assert pair == policy_exits(recording, policy_named("patience", 3)).tolist()


def test_states_that_are_nearly_parallel_exit_but_not_at_the_first_exit(model):
    similar = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    below = [[1.0, 0.1], [0.0, 1.0], None]
    earlier = [
        {} if state is None else {0: ExitAnswer(3, 0.5, torch.tensor(state))} for state in below
    ]
    policy = policy_named({"similarity": 0.1}, 2)

    def reading(k):
        return ExitReading(k, [0, 1, 2], [0.5] * 3, similar, earlier, lambda: ([3] * 3, similar))

    assert policy.decide(reading(1)) == [True, False, False]
    assert policy.decide(reading(0)) == [False] * 3
