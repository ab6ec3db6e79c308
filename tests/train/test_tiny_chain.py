"""`deliberate.train.tiny_chain` trains what the experiment of that name configures, in its time."""

from __future__ import annotations

from importlib import resources
from types import SimpleNamespace

import pytest

from deliberate.data.chains import CHAINS
from deliberate.train import tiny_chain
from deliberate.utils.hydra_config import compose


def test_its_size_and_recipe_are_those_of_the_experiment():
    cfg = compose("train", ["+experiment=tiny_chain"])
    names = {
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "max_position_embeddings": "max_positions",
    }
    size = {name: cfg.model[names.get(name, name)] for name in tiny_chain.SIZE}
    assert size == tiny_chain.SIZE
    assert cfg.model.vocab_size == tiny_chain.VOCABULARY
    assert dict(cfg.data.weights) == {CHAINS: 1.0} and cfg.data.packing
    assert cfg.data.max_tokens == tiny_chain.MAX_TOKENS
    assert tuple(cfg.exits.layers) == tiny_chain.EXITS.layers
    assert cfg.exits.rank == tiny_chain.EXITS.rank
    assert cfg.exits.max_pending == tiny_chain.EXITS.max_pending
    assert cfg.exits.translator == tiny_chain.EXITS.translator
    assert {k: v for k, v in cfg.recipe.items() if k != "name"} == tiny_chain.RECIPE
    own = {"log_every", "save_every"}
    for name, value in tiny_chain.TRAINER.items():
        assert name in own or cfg.trainer[name] == value, name
    assert cfg.trainer.optimizer == "muon" and cfg.trainer.curriculum == tiny_chain.CURRICULUM
    assert cfg.trainer.target_agreement == tiny_chain.TARGET_AGREEMENT


def test_the_bundled_model_was_trained_by_the_experiment_for_a_cpu():
    cfg = compose("train", ["+experiment=tiny_chain_cpu"])
    assert (cfg.model.path, cfg.recipe.name, dict(cfg.data.weights)) == (
        "tiny", "layerskip", {CHAINS: 1.0}
    )  # fmt: skip
    trainer = cfg.trainer
    card = (resources.files("deliberate.checkpoints") / "tiny-chain" / "README.md").read_text()
    assert "`deliberate train +experiment=tiny_chain_cpu`" in card
    assert f"{trainer.max_steps} steps of at least {trainer.tokens_per_step:,} tokens" in card
    assert f"optimizer {trainer.optimizer}, learning rate {trainer.learning_rate}" in card
    assert f"layer_dropout {cfg.recipe.layer_dropout}" in card


@pytest.mark.parametrize(
    ("elapsed", "step", "progress"), [(0, 0, 0.0), (30, 1, 0.5), (6, 8, 0.8), (90, 9, 1.0)]
)
def test_the_end_comes_by_time_or_by_steps(monkeypatch, elapsed, step, progress):
    now = [100.0]
    monkeypatch.setattr(tiny_chain.time, "monotonic", lambda: now[0])
    trainer = object.__new__(tiny_chain.TimedTrainer)
    trainer.seconds, trainer._began = 60.0, None
    trainer.state = SimpleNamespace(global_step=step, max_steps=10)
    assert trainer.progress() == 0.0  # the clock starts with the first step
    trainer.begin()
    now[0] += elapsed
    trainer.begin()
    assert trainer.progress() == pytest.approx(progress)


def test_the_learning_rate_warms_up_stays_and_decays_to_nothing(monkeypatch):
    import torch

    trainer = object.__new__(tiny_chain.TimedTrainer)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    seen = {}
    for step, progress in ((0, 0.0), (59, 0.1), (500, 0.5), (800, 0.825), (990, 1.0)):
        monkeypatch.setattr(tiny_chain.TimedTrainer, "progress", lambda _self, p=progress: p)
        (rate,) = trainer.create_scheduler(1000, optimizer).lr_lambdas
        seen[step] = rate(step)
    assert seen == pytest.approx({0: 1 / 60, 59: 1.0, 500: 1.0, 800: 0.5, 990: 0.0})
