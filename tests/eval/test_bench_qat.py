"""`deliberate bench qat`: what rounding loses, and what of it a trained model has back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.qat import Reference, _recovered, figures, recovery
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.executors.rounded_layers import round_layers
from deliberate.utils.errors import DeliberateError

TEXTS = [Example(list(range(5, 12)), list(range(20, 30)))] * 2


def test_all_half_and_none_of_a_loss_is_taken_back():
    plain = [0.1, 0.2, 0.3, 0.25, 0.15, 0.22, 0.18, 0.3]
    rounded = [one + 0.1 + 0.01 * n for n, one in enumerate(plain)]
    half = [(a + b) / 2 for a, b in zip(plain, rounded, strict=True)]
    for trained, share in ((plain, 1.0), (half, 0.5), (rounded, 0.0)):
        found = recovery(plain, rounded, trained)
        assert found.share == pytest.approx(share) and found.lost == pytest.approx(0.135)
        assert found.interval == pytest.approx((share, share))
        assert 0.1 < found.lost_interval[0] < found.lost < found.lost_interval[1] < 0.18
        assert _recovered(found).startswith(f"{100 * share:.0f} % [")
    nothing = recovery(plain, [one + (-1) ** n for n, one in enumerate(plain)], rounded)
    assert "nothing to recover; it is +0.1350 from float" in _recovered(nothing)
    assert recovery(plain, rounded, rounded).p == 1 > 0.05 > recovery(plain, rounded, half).p


def test_exits_are_read_over_rounded_layers_in_turn(tmp_path):
    model = AdaptiveModel.from_pretrained("tiny", executor="generic").eval()
    plain = figures(model, TEXTS)
    assert 0 <= plain.exited <= 1 and len(plain.nll) == 2 and plain.nll[0] == plain.nll[1]
    every = model.exit_config.with_thresholds(1e-6)
    model.set_exit_config(every)
    assert figures(model, TEXTS).exited == 1
    model.set_exit_config(every.with_thresholds(math.inf))
    none = figures(model, TEXTS)
    assert none.exited == 0 and math.isnan(none.accepted) and none.nll == plain.nll
    reference = Reference(model, TEXTS)
    itself = figures(model, TEXTS, reference)
    assert itself.divergence == pytest.approx([0, 0], abs=1e-6) and itself.same == 1
    round_layers(model.backbone, "int3_rows")
    rounded = figures(model, TEXTS, reference)
    assert rounded.nll != plain.nll and rounded.same < 1
    # Of the reference as it was: rounding the model has not changed what was kept of it.
    float_model = AdaptiveModel.from_pretrained("tiny", executor="generic").eval()
    ids = torch.tensor([TEXTS[0].prompt + TEXTS[0].answer])
    with torch.inference_mode():
        before = float_model.base(ids).logits[0, 6:-1].log_softmax(-1)
        after = model.base(ids).logits[0, 6:-1].log_softmax(-1)
    wanted = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")
    assert rounded.divergence[0] == pytest.approx(float(wanted), rel=1e-3)


def test_the_command_writes_every_model(tmp_path):
    folder, out = save_checkpoint(tmp_path / "model"), tmp_path / "out.json"
    common = [f"model={folder}", f"trained={folder}", f"control={folder}", "limit=4"]
    run_benchmark(["qat", *common, "task.size=4", "weights=int3_rows", f"out={out}"])
    found = json.loads(out.read_text())
    assert list(found["figures"]) == ["float", "rounded", "trained", "control"]
    assert found["divergence"]["trained"]["share"] == 0
    assert found["recovery"]["trained"]["share"] == 0 and found["recovery"]["control"]["p"] == 1
    with pytest.raises(DeliberateError, match="weights 'bf16' round nothing"):
        run_benchmark(["qat", *common, "weights=bf16"])
    with pytest.raises(DeliberateError, match="trained=null: give the model"):
        run_benchmark(["qat", f"model={folder}"])


def test_texts_of_a_file_are_read_in_place_of_problems(tmp_path):
    folder, out, file = save_checkpoint(tmp_path / "model"), tmp_path / "out.json", tmp_path / "own"
    rows = [{"tokens": [5, 6, 7, 8 + n, 9, 10], "prompt": n % 3} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"model={folder}", f"trained={folder}", f"texts={file}", "weights=int3_rows"]
    run_benchmark(["qat", *common, "limit=5", f"out={out}"])
    found = json.loads(out.read_text())
    assert found["texts"] == 5
    model = AdaptiveModel.from_pretrained(folder, executor="generic").eval()
    own = Example([5], [6, 7, 8, 9, 10]), Example([5, 6], [7, 10, 9, 10])
    nll = found["figures"]["float"]["nll"]
    assert [nll[0], nll[2]] == pytest.approx(figures(model, own).nll, abs=1e-5)
    with pytest.raises(DeliberateError, match="does not exist: give a file of JSON lines"):
        run_benchmark(["qat", *common[:2], f"texts={file}.no"])
