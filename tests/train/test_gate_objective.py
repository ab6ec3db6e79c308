"""Training the deliberation gate, and what it costs: the objective, the recipe, lambda."""

from __future__ import annotations

import shutil

import pytest
import torch
from gate_cases import BAND, shaken
from omegaconf import OmegaConf
from random_checkpoint import save_checkpoint
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.modeling.deliberation_gate import run_rounds
from deliberate.train.app import train
from deliberate.train.objectives.gate import GateObjective
from deliberate.train.resume import check_same_run
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import RENAMED, compose


def batch(*sizes):
    ids = torch.zeros(len(sizes), max(sizes), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, size in enumerate(sizes):
        ids[row, :size] = random_ids(size, seed=row)[0]
        labels[row, 3:size] = ids[row, 3:size]
    return {"input_ids": ids, "labels": labels}


def objective(**changes):
    model = AdaptiveModel(tiny_model("llama", layers=4), [1, 2])
    given = {"width": 24, "heads": 2, "rounds": 2, "gate_threshold": BAND} | {
        "initial_threshold": BAND
    }
    made = GateObjective(model, **given | {"smoothing": 0.0} | changes)
    shaken(made.gate)
    return made.eval()


def test_the_loss_is_that_of_the_tokens_as_decoding_would_refine_them():
    made = objective(penalty=0.3, rounds=4)
    model, data = made.model, batch(9, 14, 30, 40)
    out = made(**data)
    loss, fires, count, refined = 0.0, 0, 0, 0.0
    taken: set[int] = set()
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        for place in range(len(ids) - 1):
            target = int(labels[place + 1])
            if target == IGNORE_INDEX:
                continue
            count += 1
            last = model(ids[None, : place + 1], output_exit_states=True).last
            wanted = torch.zeros(1, place + 1, dtype=torch.bool)
            wanted[0, -1] = True
            outputs = run_rounds(made.gate, last, wanted, model.backbone.logits)
            each = [
                -torch.log_softmax(model.backbone.logits(state[0]), -1)[target].item()
                for state in outputs.states
            ]
            refined += each[-1]
            if not outputs.rounds:
                continue
            taken.add(int(outputs.rounds))
            loss += sum(each) / 4
            took = zip(outputs.gates, outputs.fires, strict=True)
            loss += 0.3 * sum(g[0].item() for g, fired in took if fired[0])
            fires += int(outputs.rounds)
    assert out.loss.item() == pytest.approx(loss / count, rel=1e-5)
    assert out.sums["loss/gate"].item() == pytest.approx(refined, rel=1e-4)
    assert len(taken) > 1  # some were sure before the last round
    assert out.sums["rounds"] == fires > 0 and out.sums["tokens"] == count


def test_only_the_gate_gets_gradients_and_all_of_it_does():
    made = objective()
    for size in (4, 14):  # of a text without any uncertain token too
        made.zero_grad(set_to_none=True)
        made(**batch(size)).loss.backward()
        own = {id(p) for p in made.gate.parameters()}
        for parameter in made.parameters():
            assert (parameter.grad is not None) == (id(parameter) in own)
            assert parameter.requires_grad == (id(parameter) in own)


def test_the_gate_threshold_is_the_initial_one_and_then_that_of_decoding():
    made = objective(initial_threshold=0.9, initial_share=0.5)
    thresholds, seen = [], []
    for step in (0, 3, 4, 7):
        made.step, made.steps = step, 8
        thresholds.append(made.gate_threshold())
        seen.append(int(made(**batch(14)).sums["tokens/doubt"]))
    assert thresholds == [0.9, 0.9, BAND, BAND] and seen[0] > seen[-1]


def test_training_lowers_the_loss_of_uncertain_tokens():
    model = AdaptiveModel(tiny_model("llama", layers=2, dtype=torch.float32), [1])
    made = GateObjective(model, width=32, heads=2, gate_threshold=0.9, smoothing=0.0).train()
    optimizer = torch.optim.AdamW(made.gate.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        losses.append(made(**batch(14, 14)).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"penalty": -1.0},
        {"initial_threshold": 0.5},
        {"smoothing": 1.0},
        {"block": "lstm"},
        {"start": "middle"},
        {"start": "last_layer"},
    ],
)
def test_an_impossible_recipe_is_refused(wrong):
    model = AdaptiveModel(tiny_model("llama", layers=2), [1])
    with pytest.raises(DeliberateError, match=next(iter(wrong))):
        GateObjective(model, heads=2, **wrong)


def test_a_gate_that_starts_from_the_last_layer_is_that_layer_on_final_states():
    base = tiny_model("llama", layers=2, num_key_value_heads=4)
    model = AdaptiveModel(base, [1])
    made = GateObjective(model, heads=4, width=64, start="last_layer", start_scale=1.0, gated=False)
    ids = random_ids(7)
    with torch.inference_mode():
        last = model(ids, output_exit_states=True).last
        ctx = model.backbone.context(0, 7, device="cpu")
        keys, values = made.gate.memory(last, ctx.positions)
        queries = made.gate.queries(last, ctx.positions).transpose(1, 2)
        looked = made.gate.attend(queries, keys, values, is_causal=True)
        own = made.gate.block.out(looked)
        norm, layer = model.backbone.layers[1].input_layernorm, model.backbone.layers[1]
        expected = layer.self_attn(
            norm(last), position_embeddings=ctx.position_embeddings, attention_mask=None
        )[0]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_the_experiment_trains_a_gate_and_does_not_change_the_model(tmp_path):
    stock = save_checkpoint(tmp_path / "stock")

    def run(*overrides):
        cfg = compose(
            "train",
            ["+experiment=gate", "debug=fast", "data=words", f"model.path='{stock}'",
             "trainer.max_steps=4", "trainer.save_every=2", "trainer.bf16=false",
             "recipe.width=24", "recipe.heads=2", "data.max_tokens=160",
             "trainer.tokens_per_step=600", "trainer.micro_batches=2",
             f"output_dir='{tmp_path / 'run'}'", *overrides],
        )  # fmt: skip
        return train(cfg)

    record = run()
    last = [line for line in record["history"] if "loss" in line][-1]
    assert last["loss/gate"] > 0 and last["rounds"] > 0 and 0 < last["g/doubt"] < 1
    made = AdaptiveModel.from_pretrained(tmp_path / "run" / "model")
    before = AdaptiveModel.from_pretrained(stock).state_dict()
    after = made.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert bool(made.gate.block.out.weight.any())
    # As if killed after step 2.
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    assert run("resume=true")["resumed_from"] == "checkpoint-2"
    again = AdaptiveModel.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in after.items())


def test_a_run_with_the_earlier_names_of_its_settings_is_the_same_run(tmp_path):
    cfg = compose("train", ["+experiment=gate", f"output_dir='{tmp_path}'", "resume=true"])
    text = OmegaConf.to_yaml(cfg)
    for old, new in RENAMED["train"].items():
        text = text.replace(f"{new.rpartition('.')[2]}:", f"{old.rpartition('.')[2]}:")
    assert "think_below: 0.99" in text and "gate_threshold" not in text
    (tmp_path / "config.yaml").write_text(text)
    assert check_same_run(cfg, tmp_path) == []
