"""The objectives of the recipes against slow references that call the transformers model itself."""

from __future__ import annotations

import pytest
import torch
from objective_cases import EXITS, LAYERS, adaptive, batch_of
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX
from deliberate.modeling.exit_config import ExitConfig
from deliberate.train.losses import exit_loss_weights
from deliberate.train.objectives.heads import HeadsObjective
from deliberate.train.objectives.pretrain import PretrainObjective
from deliberate.train.optim import build_optimizer


def reference_loss(model, batch, weights, gate_weight):
    """Row by row without padding: the HF model's hidden states at the exits, its own logits."""
    total, count = 0.0, 0
    per_exit = [0.0] * len(weights)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        size = int((labels != IGNORE_INDEX).nonzero()[-1]) + 1
        with torch.no_grad():
            out = model.base(ids[None, :size], output_hidden_states=True)
        norm, head = model.base.model.norm, model.base.lm_head
        for position in range(2, size - 1):
            target = int(ids[position + 1])
            logits, odds = [], []
            for i, layer in enumerate(EXITS):
                normed = norm(out.hidden_states[layer][0, position])
                translator = model.exits.translators[i]
                moved = normed + translator.up.weight @ (translator.down.weight @ normed)
                logits.append(head.weight @ moved)
                odds.append(model.exits.gates[i](normed))
            logits.append(out.logits[0, position])
            for i, row in enumerate(logits):
                loss = -torch.log_softmax(row, dim=-1)[target].item()
                per_exit[i] += loss
                total += weights[i] * loss
            for row, odd in zip(logits, odds, strict=False):
                p = torch.sigmoid(odd).item()
                agrees = int(row.argmax()) == int(logits[-1].argmax())
                total -= gate_weight * float(torch.tensor(p if agrees else 1 - p).log())
            count += 1
    return total / count, [loss / count for loss in per_exit], count


def test_pretraining_loss_equals_a_slow_reference():
    model = adaptive()
    objective = PretrainObjective(
        model, scale="linear", early_scale=0.4, layer_dropout=0.3, gate_weight=0.7
    ).eval()
    batch = batch_of(9, 14, 6)
    weights = exit_loss_weights(EXITS, LAYERS, scale="linear", early_scale=0.4)
    expected, per_exit, count = reference_loss(model, batch, weights, 0.7)
    out = objective(**batch)
    assert out.loss.item() == pytest.approx(expected, rel=1e-4)
    assert out.sums["tokens"] == count == 20
    for name, value in zip(["exit1", "exit3", "exit4"], per_exit, strict=True):
        assert out.sums[f"loss/{name}"].item() / count == pytest.approx(value, rel=1e-4)
    assert out.sums["agree/exit4"] == count


@pytest.mark.parametrize("recipe", [PretrainObjective, HeadsObjective])
def test_micro_batches_add_up_to_one_big_batch(recipe):
    sizes = (5, 7, 12, 15)
    whole = batch_of(*sizes)
    parts = [
        {name: value[:2, :7] for name, value in whole.items()},
        {name: value[2:] for name, value in whole.items()},
    ]
    targets = int((whole["labels"] != IGNORE_INDEX).sum())

    def gradients(batches):
        model = adaptive()
        objective = recipe(model).eval()
        total = 0.0
        for batch in batches:
            loss = objective(**batch, num_items_in_batch=torch.tensor(targets)).loss
            loss.backward()
            total += loss.item()
        return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    one, expected = gradients([whole])
    several, got = gradients(parts)
    assert several == pytest.approx(one, rel=1e-5)
    assert recipe(adaptive()).eval()(**whole).loss.item() == pytest.approx(one, rel=1e-5)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


def layer_inputs_and_outputs(objective, ids):
    seen = {}

    def keep(index):
        def hook(_module, args, output):
            seen[index] = args[0].detach(), output.detach()

        return hook

    layers = objective.model.backbone.layers
    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    objective(input_ids=ids, labels=ids)
    for handle in handles:
        handle.remove()
    return [(seen[i][0] == seen[i][1]).flatten(1).all(dim=1) for i in range(LAYERS)]


def test_layer_dropout_skips_whole_rows_while_training_and_never_after():
    objective = PretrainObjective(adaptive(), layer_dropout=0.6).train()
    ids = random_ids(6, batch=200)
    torch.manual_seed(0)
    skipped = layer_inputs_and_outputs(objective, ids)
    shares = [rows.float().mean().item() for rows in skipped]
    assert shares[0] == 0.0
    for layer in range(1, LAYERS):
        assert shares[layer] == pytest.approx(0.6 * (2 ** (layer / (LAYERS - 1)) - 1), abs=0.1)
    assert not any(rows.any() for rows in layer_inputs_and_outputs(objective.eval(), ids))
    plain = PretrainObjective(adaptive(), layer_dropout=0.0)
    out = plain.eval()(input_ids=ids, labels=ids).loss
    assert torch.equal(objective(input_ids=ids, labels=ids).loss, out)


def test_the_gates_learn_without_moving_anything_else():
    def gradients(gate_weight):
        model = adaptive()
        PretrainObjective(model, gate_weight=gate_weight).eval()(**batch_of(9, 12)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    without, with_gates = gradients(0.0), gradients(5.0)
    gates = {name for name in without if name.startswith("exits.gates")}
    assert len(gates) == 2 * len(EXITS)
    for name, gradient in without.items():
        assert torch.equal(gradient, with_gates[name]) == (name not in gates)


def divergence_to_top(model, ids):
    with torch.no_grad():
        states = model(ids, output_exit_states=True)
        backbone = model.backbone
        top = torch.log_softmax(backbone.logits(states.last), dim=-1)
        result = []
        for i, state in enumerate(states.exits):
            moved = model.exits.translate(i, backbone.norm(state))
            early = torch.log_softmax(backbone.head_logits(moved), dim=-1)
            result.append((top.exp() * (top - early)).sum(-1).mean().item())
    return result


def test_distilled_heads_approach_the_last_layer_and_the_backbone_does_not_change():
    base = tiny_model("llama", layers=LAYERS, dtype=torch.float32)
    model = AdaptiveModel(base, ExitConfig.build(LAYERS, EXITS, translator="full"))
    objective = HeadsObjective(model, ce_weight=0.0).train()
    assert not model.base.training and model.exits.training
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    optimizer = build_optimizer(objective, "muon", lr=0.02, weight_decay=0.0)
    ids = random_ids(24, batch=8)
    at_first = divergence_to_top(model, ids)
    first_gates = [gate.weight.detach().clone() for gate in model.exits.gates]
    for _ in range(25):
        objective(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for early, late in zip(divergence_to_top(model, ids), at_first, strict=True):
        assert early < 0.7 * late
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    for gate, first in zip(model.exits.gates, first_gates, strict=True):
        assert not torch.equal(gate.weight, first)


def test_heads_loss_is_divergence_plus_cross_entropy_of_the_last_layers_token_plus_gates():
    model = adaptive()
    batch = batch_of(8, 11)
    settings = {"kl_weight": 0.5, "ce_weight": 0.3, "gate_weight": 0.2, "temperature": 2.0}
    got = HeadsObjective(model, **settings)(**batch)
    with torch.no_grad():
        states = model(batch["input_ids"], output_exit_states=True)
    wanted = batch["labels"][:, 1:] != IGNORE_INDEX
    norm = model.backbone.norm
    top = model.backbone.head_logits(norm(states.last[:, :-1][wanted]))
    answer = top.argmax(-1)
    total = 0.0
    for i, state in enumerate(states.exits):
        normed = norm(state[:, :-1][wanted])
        logits = model.backbone.head_logits(model.exits.translate(i, normed))
        p, q = torch.softmax(top / 2.0, -1), torch.softmax(logits / 2.0, -1)
        total += 0.5 * 4.0 * (p * (p / q).log()).sum()
        rows = torch.arange(len(answer))
        total -= 0.3 * torch.log_softmax(logits, -1)[rows, answer].sum()
        agrees = logits.argmax(-1) == answer
        chance = torch.sigmoid(model.exits.gate_logit(i, normed))
        total -= 0.2 * torch.where(agrees, chance, 1 - chance).log().sum()
    expected = total / len(EXITS) / int(wanted.sum())
    torch.testing.assert_close(got.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "gpt_neox"])
def test_both_recipes_run_on_other_architectures(arch):
    for recipe in (PretrainObjective, HeadsObjective):
        out = recipe(adaptive(arch)).train()(**batch_of(6, 9))
        out.loss.backward()
        assert torch.isfinite(out.loss) and out.sums["tokens"] == 9
