"""The CUDA executor by references and under the interpreter: the generic one's tokens."""

from __future__ import annotations

import copy

import kernel_cases as kernels
import pytest
import torch
from cuda_cases import DTYPE, adaptive, by_ops, cpu_only
from fused_cases import close, family, stepwise
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.executors.quantization import Storage, store, widened
from deliberate.kernels.registry import KERNELS
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitReader
from deliberate.modeling.measures import MEASURES


@cpu_only
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama tied, with biases",
        "llama, one key head each",
        "llama, yarn",
        "llama, dynamic",
        "mistral",
        "qwen2",
        "qwen2, windows",
        "qwen3",
    ],
)
def test_logits_and_keys_equal_the_generic_executor(name):
    model, ids = family(name), random_ids(20)
    theirs, their_cache = stepwise(Backbone(model), ids)
    ours, our_cache = stepwise(by_ops(model, boundaries=(1, 3)), ids)
    assert close(ours, theirs)
    for layer in range(4):
        for mine, other in zip(our_cache.states(layer), their_cache.states(layer), strict=True):
            assert close(mine, other)


@cpu_only
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_ragged_rows_equal_the_generic_executor(name):
    model, ids = family(name), random_ids(24, batch=3)
    made = []
    for backbone in (Backbone(model), by_ops(model)):
        with torch.inference_mode():
            cache = backbone.new_cache(8, 3)
            ctx = backbone.context(0, 14, device="cpu")
            backbone.run_layers(backbone.embed(ids[:, :14], ctx), 0, 4, ctx, cache)
            for row, held in enumerate((14, 9, 4)):
                cache.crop(held, row)
            rows, starts, counts = (0, 2), (14, 4), (2, 5)
            ctx = backbone.pass_context(rows, starts, counts, batch=3)
            hidden = backbone.embed(ids[[0, 2], 14:19], ctx)
            first = backbone.run_layers(hidden, 0, 4, ctx, cache)
            cache.keep((1, 2))
            ctx = backbone.pass_context((0, 1), (9, 9), (1, 1), batch=2)
            second = backbone.run_layers(backbone.embed(ids[:2, 20:21], ctx), 0, 4, ctx, cache)
            state = torch.randn(1, 1, 32, dtype=torch.float64, generator=_generator())
            ctx = backbone.pass_context((1,), (10,), (1,), batch=2)
            backbone.run_layers(backbone.embed(ids[:1, 21:22], ctx), 0, 2, ctx, cache)
            backbone.fill_layers(state, 2, 4, ctx, cache)
            lengths = [cache.row_lengths(row) for row in range(2)]
            held = cache.states(3, 1)
        made.append((first[0, :2], first[1], second, *held, lengths))
    for mine, other in zip(made[1][:-1], made[0][:-1], strict=True):
        assert close(mine, other)
    assert made[1][-1] == made[0][-1] == [[10] * 4, [11] * 4]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


GENERATIONS = [
    ("dense", "defer"),
    ("exact", "defer"),
    ("threshold", "defer"),
    ("threshold", "propagate"),
    ("threshold", "skip"),
]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_generations_equal_those_of_the_generic_executor(name):
    """Single and ragged batches, every fidelity; with and without running ahead.

    On a GPU: compiled kernels, captured graphs.
    """
    ids = random_ids(9, batch=3).to(kernels.DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    base = family(name, dtype=DTYPE).to(kernels.DEVICE)
    plain = AdaptiveModel(base, [1, 2])
    ours = [adaptive(base, [1, 2], prefetch=multi_step) for multi_step in (False, True)]
    for fidelity, kv_mode in GENERATIONS:
        settings = {
            "max_new_tokens": 12,
            "fidelity": fidelity,
            "thresholds": 0.4,
            "kv_mode": kv_mode,
        }
        for prompts, given in ((ids[:1], {}), (ids, {"attention_mask": mask})):
            expected = plain.generate(prompts, **given, **settings)
            for model in ours:
                made = model.generate(prompts, **given, **settings)
                assert torch.equal(made, expected), (fidelity, kv_mode, len(prompts))
    first, second = (model.backbone for model in ours)
    assert first.captures.reason is None and second.captures.reason is None
    assert second.launches.taken > 0 and first.launches.taken == 0
    assert len(first._pool._kept[1]) <= 2


@cpu_only
@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("name", "kv_mode"), [("qwen2", "defer"), ("qwen3", "propagate")])
def test_the_triton_kernels_choose_the_same_tokens(name, kv_mode):
    base = family(name, dtype=torch.float32, layers=2)
    settings = {"max_new_tokens": 4, "fidelity": "threshold", "thresholds": 0.2, "kv_mode": kv_mode}
    ids = random_ids(3, batch=2)
    expected = AdaptiveModel(base, [1]).generate(ids, **settings)
    with kernels.running("triton"):
        made = adaptive(base, [1], prefetch=True).generate(ids, **settings)
    assert torch.equal(made, expected)


@cpu_only
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_smaller_weights_go_through_the_ops(weights):
    model, ids = tiny_model("qwen2", dtype=torch.float32), random_ids(20)
    with KERNELS.override({"int8_linear": "torch"}):  # not rounding what goes in
        ours, _ = stepwise(by_ops(model, weights=weights), ids)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                stored = store(module.weight, Storage(weights))
                module.weight.copy_(widened(stored, torch.float32))
    native, _ = stepwise(by_ops(model), ids)
    theirs, _ = stepwise(by_ops(rounded), ids)
    assert close(ours, theirs, 1e-4) and not close(ours, native, 1e-4)


@cpu_only
def test_the_ops_that_run_are_the_registrys_choice():
    """A backend registered for this request runs inside the executor."""
    seen = []
    model, ids = family("llama"), random_ids(20)
    expected, _ = stepwise(by_ops(model), ids)
    torch_mlp = KERNELS.chosen("skip_mlp", _request()).run

    @KERNELS.register("skip_mlp", "mine", lambda request: request.shape["rows"] == 1)
    def mine(residual, normed, gate_up, down, rows, count):
        seen.append(int(count))
        torch_mlp(residual, normed, gate_up, down, rows, count)

    try:
        made, _ = stepwise(by_ops(model), ids)
    finally:
        KERNELS.remove("skip_mlp", "mine")
    assert torch.equal(made, expected)
    assert seen == [1] * (3 * 4)  # three single tokens through four layers


def _request():
    from deliberate.kernels.registry import KernelRequest

    return KernelRequest("cpu", torch.float64, {"rows": 1, "width": 32, "inner": 64})


# -- exits and the top -----------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("translator", ["low_rank", "full", "none"])
@pytest.mark.parametrize("measure", list(MEASURES))
def test_exits_read_the_same_without_logits(measure, translator, folded):
    exits = ExitConfig.build(4, [1, 2], measure=measure, translator=translator, rank=3)
    model = adaptive(tiny_model("llama"), exits)
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=_generator()))
    backbone, settings = model.backbone, {"model_bytes": 10**9 if folded else 0}
    plain = ExitReader(
        model.exits,
        backbone.norm,
        backbone.lm_head,
        Backbone(model.base).head_logits,
        backbone.softcap,
        **settings,
    )
    reader = backbone.exit_reader(model.exits, **settings)
    states = torch.randn(3, 32, dtype=torch.float64, generator=_generator())
    # The least sure first: those that leave are not the first rows.
    states = states[torch.tensor(plain.evaluate(0, states, 2.0).confidences).argsort()]
    for index in range(2):
        middle = sorted(plain.evaluate(index, states, 0.5).confidences)[1]
        for threshold in (middle - 1e-3, 0.0, 2.0):
            theirs, ours = (one.evaluate(index, states, threshold) for one in (plain, reader))
            assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-5, abs=1e-7)
            on = [row for row in range(3) if theirs.confidences[row] < threshold]
            buffers, _ = reader._buffers_for(index, 3)
            assert buffers.going.tolist() == on + [-1] * (4 - len(on))
            assert int(buffers.remaining) == len(on)
            for row in range(3):
                assert ours.token(row) == theirs.token(row)
            assert close(ours.logits(1), theirs.logits(1))


@cpu_only
def test_the_top_is_read_without_logits(monkeypatch):
    model = tiny_model("qwen3")
    backbone = by_ops(model)
    states = torch.randn(5, 32, dtype=torch.float64, generator=_generator())
    expected = Backbone(model).logits(states)
    requested = []
    logits = backbone.logits
    monkeypatch.setattr(backbone, "logits", lambda x: requested.append(len(x)) or logits(x))
    reading = backbone.read_full_depth(states)
    some = reading.take([3, 1])
    assert (
        reading.tokens == expected.argmax(dim=-1).tolist() and some.tokens[0] == reading.tokens[3]
    )
    best = expected.softmax(dim=-1).amax(dim=-1).tolist()
    assert reading.probabilities == pytest.approx(best, rel=1e-5)
    assert some.probabilities == pytest.approx([best[3], best[1]], rel=1e-5)
    assert requested == []
    assert close(some.logits, expected[[3, 1]]) and close(reading.logits, expected)
    assert requested == [2, 5]
