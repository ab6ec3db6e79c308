"""`deliberate bench agreement`: thresholds for a wanted agreement, and what they are worth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import CONTEXT, LAYERS, save_checkpoint
from synthetic_recordings import synthetic_recording
from tiny_models import VOCAB, tiny_model

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.data.prompts import Encoder
from deliberate.eval.benchmarks import agreement as bench_agreement
from deliberate.eval.benchmarks.agreement_thresholds import (
    agreement,
    choose_thresholds,
    exit_rates,
    share,
)
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.tasks.held_out_loss import compare_losses, text_losses
from deliberate.eval.tasks.registry import build_task, evaluation_config
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

RECORDING = synthetic_recording(60, 20)


def recording(scores, agrees, sequence=None, layers=(1, 2), num_layers=4):
    """A recording whose exits agree where told to."""
    right = np.asarray(agrees, dtype=bool)
    final = np.zeros(len(right), dtype=np.int32)
    where = np.arange(len(right)) if sequence is None else np.asarray(sequence)
    return Recording(
        layers=layers,
        num_layers=num_layers,
        measure="max_prob",
        scores=np.asarray(scores, dtype=np.float32),
        tokens=np.where(right, 0, 1).astype(np.int32),
        final=final,
        final_scores=np.ones(len(right), dtype=np.float32),
        sequence=where.astype(np.int32),
        position=np.zeros(len(right), dtype=np.int32),
    )


@settings(max_examples=25, deadline=None)
@given(st.floats(0.6, 1.0), st.integers(0, 5))
def test_the_wanted_share_of_all_tokens_agrees_where_the_thresholds_were_chosen(target, seed):
    made = synthetic_recording(20, 12, seed=seed)
    found = replay(made, choose_thresholds(made, target))
    assert 1 - found.risk >= target - 1e-9
    assert found.mean_layers <= made.num_layers


def test_a_lower_agreement_saves_more_layers():
    layers = [replay(RECORDING, choose_thresholds(RECORDING, t)).mean_layers for t in
              (0.999, 0.99, 0.95, 0.9)]  # fmt: skip
    assert layers == sorted(layers, reverse=True) and layers[-1] < layers[0]


def test_tokens_that_stay_make_room_for_less_sure_ones_that_leave():
    # One token in ten is confident at the first exit, and half of those are wrong there.
    scores = np.full((100, 2), 0.1)
    agrees = np.zeros((100, 2), dtype=bool)
    scores[:10, 0], agrees[:10:2, 0] = 0.9, True
    made = recording(scores, agrees)
    assert choose_thresholds(made, 0.95) == (pytest.approx(0.9), math.inf)
    assert choose_thresholds(made, 0.96) == (math.inf, math.inf)


def test_exits_that_may_not_be_asked_are_never_left_at():
    chosen = choose_thresholds(RECORDING, 0.9, [False, True, False])
    assert chosen[0] == chosen[2] == math.inf and chosen[1] < 1
    assert choose_thresholds(RECORDING, 0.9, [False] * 3) == (math.inf,) * 3


def test_a_target_outside_its_range_is_refused():
    with pytest.raises(DeliberateError, match=r"target agreement 0.0 is outside \(0, 1\]"):
        choose_thresholds(RECORDING, 0.0)


def test_figures_of_exits_are_those_counted_by_hand():
    made = recording(
        [[1.0, 0.2], [0.75, 1.0], [0.1, 1.0], [0.1, 0.1]],
        [[True, False], [False, True], [True, False], [False, True]],
        sequence=[0, 0, 1, 1],
    )
    found = agreement(made, (0.75, 1.0))
    assert [row.agreement.value for row in found.exits] == [0.5, 0.5]
    assert [row.leaving for row in found.exits] == [0.5, 0.25]
    assert [row.kept.value for row in found.exits] == [0.5, 0.0]
    assert found.reached.value == 0.5  # the first leaves rightly, the last stays
    assert found.layers_per_token == pytest.approx((1 + 1 + 2 + 4) / 4)
    assert exit_rates(made, (0.75, 1.0)) == [0.5, 0.5]
    assert agreement(made, (math.inf, math.inf)).exits[0].kept is None


def test_intervals_resample_sequences_not_tokens():
    alike = np.repeat([True, False] * 10, 50)  # every sequence is all right or all wrong
    sequence = np.repeat(np.arange(20), 50)
    whole = share(alike, sequence).interval
    as_if = share(alike, np.arange(1000)).interval
    assert whole.high - whole.low > 4 * (as_if.high - as_if.low)
    assert share([True, False], [3, 3]).interval is None


@pytest.fixture(scope="module")
def adaptive():
    model = AdaptiveModel(tiny_model("llama"), [1, 3])
    with torch.no_grad():
        for translator in model.exits.translators:
            for parameter in translator.parameters():
                parameter.add_(0.1)
    return model


def test_the_loss_of_a_text_is_what_transformers_computes_for_it_alone(adaptive):
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCAB, size).tolist() for size in (5, 17, 2, 9)]
    found = text_losses(adaptive, documents, batch=3)
    for ids, nats, count in zip(documents, found.sums, found.counts, strict=True):
        row = torch.tensor([ids])
        with torch.no_grad():
            alone = adaptive.base(row, labels=row).loss
        assert count == len(ids) - 1 and nats / count == pytest.approx(alone.item(), rel=1e-5)
    assert found.top.value == pytest.approx(sum(found.sums) / sum(found.counts))
    with torch.no_grad():
        logits = adaptive.base(torch.tensor([documents[1]])).logits[0, 3:-1]
        rest = torch.nn.functional.cross_entropy(logits, torch.tensor(documents[1][4:]))
    part = text_losses(adaptive, documents, given=[1, 4, 1, 8], batch=3)
    assert part.counts == (4, 13, 1, 1)
    assert part.sums[1] / 13 == pytest.approx(rest.item(), rel=1e-5)
    assert part.sums[0] == pytest.approx(found.sums[0])
    with pytest.raises(DeliberateError, match="a token given and one to predict"):
        text_losses(adaptive, documents, given=[1, 17, 1, 1])
    # An exit's, by hand: its own layers, norm, translator and head.
    row = torch.tensor([documents[1]])
    with torch.no_grad():
        state = adaptive(row, output_exit_states=True).exits[1][:, :-1]
        normed = adaptive.backbone.norm(state)
        logits = adaptive.backbone.head_logits(adaptive.exits.translate(1, normed))
        nats = torch.nn.functional.cross_entropy(logits[0], row[0, 1:])
    one = text_losses(adaptive, [documents[1]])
    assert one.exits[1].value == pytest.approx(nats.item(), rel=1e-5) and len(one.exits) == 2


def test_losses_are_compared_document_by_document(adaptive):
    documents = [[1, 2, 3, 4], [5, 6, 7]]
    found = text_losses(adaptive, documents)
    other = text_losses(AdaptiveModel(tiny_model("llama", seed=1), [1, 3]), documents)
    assert compare_losses(found, found).value == 0.0
    change = compare_losses(found, other)
    assert change.value == pytest.approx(found.top.value - other.top.value)
    with pytest.raises(DeliberateError, match="other documents"):
        compare_losses(found, text_losses(adaptive, documents[:1]))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "trained")
    tokenizer = load_tokenizer(folder)
    base = AdaptiveModel.from_pretrained(folder).base
    exits = ExitConfig(layers=(1, 3), thresholds=(0.1, 0.1), translator="none")
    AdaptiveModel(base, exits).save_pretrained(folder, merge=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "stock", seed=3)
    for name in ("adaptive_config.json", "exits.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A data folder with plain text, about a tenth of which is kept out of training."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    lines = [
        json.dumps({"text": f"Tom has {n} apples and buys {n * 7 % 31} more at the market. "
                            f"How many apples does he have?"})
        for n in range(160)
    ]  # fmt: skip
    (folder / "text" / "apples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


SMALL = (
    "prompt_tokens=6", "max_new_tokens=10", "timed=2", "warmup=1", "drop=false",
    "executor=generic", "target=0.8",
)  # fmt: skip


def test_the_command_measures_model_and_baseline_on_the_same_texts(
    checkpoint, stock, texts, tmp_path, capsys
):
    out = tmp_path / "figures.json"
    run_benchmark(["agreement", f"model={checkpoint}", f"baseline={stock}", f"data.dir={texts}",
                f"out={out}", *SMALL])  # fmt: skip
    raw = json.loads(out.read_text())
    assert list(raw["models"]) == ["baseline", "model"] and raw["target"] == 0.8
    for label, one in raw["models"].items():
        assert one["layers"] == [1, 3], "a stock checkpoint takes the other's exits"
        assert one["figures"]["tokens"] == one["decoding"]["tokens"] > 0
        assert 0 <= one["figures"]["reached"]["value"] <= 1
        modes = raw["times"][label]["variants"]
        assert list(modes) == ["transformers generate", "dense", "exact", "threshold"]
        assert modes["exact"]["identical_to_dense"] == 2 == modes["dense"]["sequences"]
        assert modes["dense"]["layers_per_token"] == LAYERS
        assert one["loss"]["top"]["value"] > 0
    change = raw["models"]["model"]["loss"]["top"]["value"]
    change -= raw["models"]["baseline"]["loss"]["top"]["value"]
    assert raw["loss_change"]["value"] == pytest.approx(change)
    shown = capsys.readouterr().out
    assert "thresholds for 80.0%" in shown and "over the baseline's" in shown


def test_of_a_task_the_loss_is_that_of_solutions(checkpoint, tmp_path):
    out = tmp_path / "figures.json"
    run_benchmark(["agreement", f"model={checkpoint}", "source=words", "size=8", f"out={out}",
                *SMALL[1:]])  # fmt: skip
    raw = json.loads(out.read_text())
    tokenizer = load_tokenizer(checkpoint)
    encoder = Encoder(tokenizer, max_tokens=CONTEXT)
    task = build_task(evaluation_config(["task.size=8"]).task, limit=8)
    examples = filter(None, map(encoder.example, task.problems))
    counts = [len(example.answer) for example in examples]
    assert counts and raw["models"]["model"]["loss"]["counts"] == counts
    assert raw["loss_change"] is None


def test_exits_that_lose_time_are_not_asked_and_it_is_said_why(checkpoint, monkeypatch):
    model = AdaptiveModel.from_pretrained(checkpoint)
    made = recording([[0.5, 0.5]] * 9 + [[0.25, 0.5]], [[True, True]] * 9 + [[False, True]])
    monkeypatch.setattr("deliberate.cost.measure.cached_cost", lambda *_: None)
    monkeypatch.setattr(
        bench_agreement, "drop_unprofitable", lambda cost, rates: ((2,), [f"rates {rates}"])
    )
    every, requested, why = bench_agreement.paying_thresholds(model, made, 1.0, drop=True)
    assert every == (0.5, 0.5) and requested == (math.inf, 0.5)
    assert why == ("rates [0.9, 1.0]",)
    same = bench_agreement.paying_thresholds(model, made, 1.0, drop=False)
    assert same == (every, every, ())


def test_threshold_modes_own_tokens_are_judged_after_their_own_text(checkpoint):
    model = AdaptiveModel.from_pretrained(checkpoint)
    prompts = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        made = [model.generate(torch.tensor([p]), fidelity="dense", max_new_tokens=6)[0, len(p):]
                .tolist() for p in prompts]  # fmt: skip
    assert bench_agreement.free_agreement(model, prompts, made).value == 1.0
    made[0][2] += 1
    assert bench_agreement.free_agreement(model, prompts, made).value < 1.0


def test_held_out_texts_are_those_that_training_never_sees(checkpoint, texts):
    from deliberate.data.texts import load_texts

    cfg = compose("bench_agreement", [f"data.dir={texts}", *SMALL], verbatim=("data.dir",))
    tokenizer = load_tokenizer(checkpoint)
    held = bench_agreement.held_out(cfg, tokenizer, None)
    decoded = {tokenizer.decode(ids, skip_special_tokens=True) for ids in held.documents}
    trained = {document.text for document in load_texts(data_dir=texts)}
    assert decoded and not decoded & trained
    assert all(len(prompt) == 6 for prompt in held.prompts)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target=0", "target=0 must be a share"),
        ("timed=1", "timed=1 must be a whole number of at least 2"),
        ("size=4", "size=4 must be a whole number of at least 8"),
        ("layers=3", r"layers=3 must be auto or a list"),
        ("drop=7", "drop=7 must be true or false"),
        ("targets=0.9", "did you mean target"),
        ("source=poems", "source=poems is neither text nor"),
    ],
)
def test_a_setting_that_cannot_work_is_named(override, message, checkpoint):
    with pytest.raises(DeliberateError, match=message):
        bench_agreement.main([override, f"model={checkpoint}"])


def test_a_baseline_with_other_tokens_is_refused(checkpoint, texts, tmp_path):
    other = tmp_path / "other"
    tiny_model("llama", dtype=torch.float32).save_pretrained(other)
    with pytest.raises(DeliberateError, match="they must share a tokenizer"):
        run_benchmark(["agreement", f"model={checkpoint}", f"baseline={other}", f"data.dir={texts}",
                    "layers=[1,2]", "executor=generic"])  # fmt: skip
