"""LayerSkip, LoRA and distillation: what each trains, saves and loads, against slow references."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from objective_cases import EXITS, LAYERS, adaptive, batch_of
from random_checkpoint import save_checkpoint
from recipe_cases import SMALL, run
from tiny_models import random_ids, tiny_model

from deliberate.api.adapters import load_adapter
from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.train.app import main
from deliberate.train.losses import exit_loss_weights
from deliberate.train.objectives.distill import DistillObjective
from deliberate.train.objectives.layerskip import LayerSkipObjective
from deliberate.train.objectives.lora import LoraObjective
from deliberate.train.objectives.pretrain import PretrainObjective
from deliberate.train.saving import plain_copy
from deliberate.train.setup import recompute_layers
from deliberate.utils.errors import DeliberateError

BATCH = batch_of(9, 14, 6)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock checkpoint: no exits."""
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "stock")
    for name in ("adaptive_config.json", "exits.safetensors"):
        (folder / name).unlink()
    return folder


def at(objective, step, steps=8):
    objective.step, objective.steps = step, steps
    return objective


def test_layerskip_without_a_curriculum_is_the_pretraining_loss():
    settings = {"scale": "layerskip", "early_scale": 0.4, "layer_dropout": 0.0, "gate_weight": 0.7}
    expected = PretrainObjective(adaptive(), **settings).eval()(**BATCH)
    got = LayerSkipObjective(adaptive(), curriculum="all", **settings).eval()(**BATCH)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "step", "on"),
    [
        ({"curriculum": "rotational", "rotation": 2}, 0, [True, False]),
        ({"curriculum": "rotational", "rotation": 2}, 3, [False, True]),
        ({"curriculum": "gradual"}, 0, [False, True]),
        ({"curriculum": "gradual"}, 4, [True, True]),
    ],
)
def test_a_step_trains_the_exits_that_are_on_and_weighs_them_anew(settings, step, on):
    objective = at(LayerSkipObjective(adaptive(), layer_dropout=0.0, **settings).eval(), step)
    out = objective(**BATCH)
    out.loss.backward()
    sums, model = out.sums, objective.model
    for i, (layer, is_on) in enumerate(zip(EXITS, on, strict=True)):
        assert bool(sums[f"tokens/exit{layer}"]) == is_on
        gradients = [p.grad for p in model.exits.translators[i].parameters()]
        # Never None: processes that wait for each other need a gradient of every parameter.
        assert any(bool(g.any()) for g in gradients) == is_on
    weights = exit_loss_weights(EXITS, LAYERS, scale="linear", early_scale=0.5)
    kept = [w if is_on else 0.0 for w, is_on in zip(weights, [*on, True], strict=True)]
    losses = [sums[f"loss/exit{layer}"].item() for layer in (*EXITS, LAYERS)]
    plain = LayerSkipObjective(objective.model, layer_dropout=0.0, gate_weight=0.0, **settings)
    loss = at(plain.eval(), step)(**BATCH).loss.item()
    total = sum(w * x for w, x in zip(kept, losses, strict=True)) / sum(kept)
    assert loss == pytest.approx(total / int(sums["tokens"]), rel=1e-5)


def test_measured_steps_see_every_exit_and_train_the_same_ones():
    def step(measuring):
        objective = at(LayerSkipObjective(adaptive(), layer_dropout=0.0).eval(), 0)
        objective.measuring = measuring
        out = objective(**BATCH)
        out.loss.backward()
        return out, [p.grad for p in objective.model.parameters()]

    (plain, before), (measured, after) = step(False), step(True)
    assert torch.equal(plain.loss, measured.loss)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert "measured" not in plain and measured.measured.shape == (20, len(EXITS), 2)
    confidence, agrees = measured.measured.unbind(-1)
    assert ((confidence > 0) & (confidence <= 1)).all()
    assert measured.sums["agree/exit3"] == agrees[:, 1].sum()
    assert measured.sums["tokens/exit3"] == 20 and plain.sums["tokens/exit3"] == 0


def test_the_exponential_schedule_begins_without_layer_dropout():
    objective = LayerSkipObjective(
        adaptive(), layer_dropout=0.9, dropout_schedule="exponential"
    ).train()
    plain = LayerSkipObjective(adaptive(), layer_dropout=0.0).train()
    expected = at(plain, 0)(**BATCH).loss
    assert torch.equal(at(objective, 0)(**BATCH).loss, expected)
    torch.manual_seed(0)
    assert not torch.equal(at(objective, 7)(**BATCH).loss, expected)


def kl(teacher, student, temperature):
    p = torch.softmax(teacher / temperature, -1)
    q = torch.log_softmax(student / temperature, -1)
    return float((p * (p.log() - q)).sum()) * temperature**2


@pytest.mark.parametrize("own", [True, False])
def test_distillation_is_divergence_from_the_teacher_and_cross_entropy(own):
    """Own: the exits learn from the model's last layer. Else all learn from another model."""
    model, teacher = adaptive(), tiny_model("llama", layers=2, dtype=torch.float32, seed=5)
    settings = {"kl_weight": 0.6, "ce_weight": 0.3, "temperature": 2.0, "gate_weight": 0.0}
    objective = DistillObjective(model, teacher=None if own else teacher, **settings).eval()
    got = at(objective, 7)(**BATCH)
    wanted = BATCH["labels"][:, 1:] != IGNORE_INDEX
    targets = BATCH["labels"][:, 1:][wanted]
    backbone = model.backbone
    with torch.no_grad():
        states = model(BATCH["input_ids"], output_exit_states=True)
        normed = [backbone.norm(s[:, :-1][wanted]) for s in (*states.exits, states.last)]
        logits = [backbone.head_logits(model.exits.translate(i, normed[i])) for i in range(2)]
        logits.append(backbone.head_logits(normed[-1]))
        taught = logits[-1] if own else teacher(BATCH["input_ids"]).logits[:, :-1][wanted]
        truth = [torch.nn.functional.cross_entropy(x, targets, reduction="sum") for x in logits]
    total = 0.0
    for i, row in enumerate(logits):
        if own and i == 2:
            total += float(truth[i])
        else:
            total += 0.6 * kl(taught, row, 2.0) + 0.3 * float(truth[i])
    assert got.loss.item() == pytest.approx(total / 3 / len(targets), rel=1e-4)
    assert ("loss/teacher" in got.sums) != own
    names = [name for name, _ in objective.named_parameters()]
    assert len(names) == len(list(model.parameters()))  # the teacher is none of them


def test_progressive_distillation_begins_with_the_deepest_exit():
    objective = DistillObjective(adaptive()).eval()
    weights = [at(objective, step).exit_weights() for step in (0, 2, 4)]
    assert [[w > 0 for w in row] for row in weights] == [
        [False, True, True],
        [True, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bitnet", "gpt_neox"])
def test_lora_starts_as_the_stock_model_and_trains_adapters_and_exits_alone(arch):
    pytest.importorskip("peft")
    ids = random_ids(12, batch=2)
    stock = AdaptiveModel(tiny_model(arch, dtype=torch.float32), EXITS)
    before = stock(ids).logits
    objective = LoraObjective(stock, rank=3).eval()
    assert torch.equal(stock(ids).logits, before)
    trained = {n for n, p in stock.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n or n.startswith("exits.") for n in trained)
    assert not any("lm_head" in n or "embed_out" in n for n in trained)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.5)
    objective.train()
    for _ in range(2):  # the first moves only the half of each adapter that starts at zero
        objective(**BATCH).loss.backward()
        optimizer.step()
    after = stock.eval()(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    merged = plain_copy(stock, objective.plain_state())
    assert set(merged.state_dict()) == set(
        AdaptiveModel(tiny_model(arch, dtype=torch.float32), EXITS).state_dict()
    )
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("recipe", [LayerSkipObjective, LoraObjective])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing_but_the_layers_run_twice(recipe, arch):
    """With layer dropout on: the second run must draw what the first drew."""
    if recipe is LoraObjective:
        pytest.importorskip("peft")
    calls = []

    def step(checkpointing):
        torch.manual_seed(3)
        objective = at(recipe(adaptive(arch), layer_dropout=0.5).train(), 0)
        if checkpointing:
            recompute_layers(objective.model)
        calls.clear()
        # Inside the layer: hooks on the layer itself are not run again.
        objective.model.backbone.layers[2].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(4)
        loss = objective(**BATCH).loss
        loss.backward()
        return loss, [p.grad for p in objective.parameters() if p.requires_grad], len(calls)

    (plain, expected, once), (loss, got, twice) = step(False), step(True)
    assert (once, twice) == (1, 2)
    assert torch.equal(loss, plain)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)


# -- from end to end -----------------------------------------------------------------------------


RECIPES = ["heads", "layerskip", "lora", "distill"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stock_checkpoint_is_trained_logged_killed_and_resumed(recipe, stock, tmp_path):
    """Each experiment on a toy: files, figures, and the second half repeated from a checkpoint."""
    if recipe == "lora":
        pytest.importorskip("peft")
    extra = ["model=folder"] if recipe == "distill" else []
    overrides = [f"+experiment={recipe}", *extra]
    if recipe == "distill":
        overrides = ["recipe=distill", "model=folder", f"recipe.teacher='{stock}'"]
    folder = tmp_path / "run"
    record = run(stock, folder, *overrides)
    assert record["recipe"] == recipe and record["steps"] == 4
    last = [line for line in record["history"] if "loss" in line][-1]
    for name in ("loss/exit1", "agree/exit2", "ece/exit1", "speed_at_99", "loss/exit4"):
        assert name in last
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["speed_at_99"]) == last["speed_at_99"] >= 1 - 1e-9
    final = AdaptiveModel.from_pretrained(folder / "model").state_dict()
    checkpoint = AdaptiveModel.from_pretrained(folder / "checkpoint-4").state_dict()
    assert all(torch.equal(final[name], checkpoint[name]) for name in final)
    # As if killed after step 2, the log of step 3 already written.
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "model")
    again = run(stock, folder, *overrides, "resume=true")
    assert again["resumed_from"] == "checkpoint-2"
    assert list(csv.DictReader((folder / "metrics.csv").open())) == rows
    resumed = AdaptiveModel.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(final[name], resumed[name]) for name in final)


def test_an_adapter_that_was_asked_for_loads_on_its_base_as_the_merged_model(stock, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel

    from deliberate.api.checkpoint import load_base, load_tokenizer

    run(stock, tmp_path, "recipe=lora", "model=folder", "recipe.save=adapter",
        "trainer.learning_rate=0.05", "trainer.max_steps=2")  # fmt: skip
    ids = random_ids(10)
    merged = AdaptiveModel.from_pretrained(tmp_path / "model")
    expected = merged(ids).logits
    loaded = load_adapter(AdaptiveModel, tmp_path / "adapter")
    usual = AdaptiveModel.from_pretrained(tmp_path / "adapter", fidelity="threshold")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    for name, value in merged.exits.state_dict().items():
        assert torch.equal(loaded.exits.state_dict()[name], value)
        assert torch.equal(usual.exits.state_dict()[name], value)
    base = load_base(str(stock))
    assert not torch.allclose(base(ids).logits, expected, atol=1e-2)
    torch.testing.assert_close(usual(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert usual.fidelity == "threshold" and usual.exit_config == loaded.exit_config
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == (load_tokenizer(stock).get_vocab())
    with pytest.raises(DeliberateError, match="has its own exits"):
        AdaptiveModel.from_pretrained(tmp_path / "adapter", exits=[1])
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "adapter" / "exits.json").unlink()
    with pytest.raises(DeliberateError, match="a PEFT adapter without exits: merge it"):
        AdaptiveModel.from_pretrained(tmp_path / "adapter")


def test_exits_are_trained_on_text_that_the_model_wrote(stock, tmp_path):
    own = ["data=self", "data.self.count=24", "data.self.max_tokens=60", "data.max_tokens=64"]
    record = run(stock, tmp_path, "recipe=heads", "model=folder", *own, "trainer.max_steps=2")
    assert record["steps"] == 2 and len(list(tmp_path.glob("self-*.jsonl"))) == 1


def test_a_dry_run_prints_a_batch_and_writes_nothing(stock, tmp_path, capsys):
    folder = tmp_path / "never"
    arguments = ["debug=dry_run", *SMALL, "recipe=heads", "model=folder", f"model.path='{stock}'"]
    main([*arguments, f"output_dir='{folder}'", "trainer.processes=2"])
    out = capsys.readouterr().out
    assert "⟦" in out and "nothing was trained" in out and "step 1/" not in out
    own = ["data=self", "data.self.max_tokens=40", "data.max_tokens=64"]
    main([*arguments, *own, f"output_dir='{folder}'"])
    assert "nothing was trained" in capsys.readouterr().out
    assert not folder.exists()


def test_heads_keep_the_packed_checkpoint_as_it_was(stock, tmp_path):
    run(stock, tmp_path, "recipe=heads", "model=folder", "data.packing=true",
        "trainer.max_steps=2", "trainer.gradient_checkpointing=true")  # fmt: skip
    before = AdaptiveModel.from_pretrained(stock, exits=[1, 2]).base.state_dict()
    after = AdaptiveModel.from_pretrained(tmp_path / "model").base.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
