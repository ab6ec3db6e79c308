"""The fused executor equals the generic one, shares its weights, and gives way by name."""

from __future__ import annotations

import pytest
import torch
from fused_cases import FAMILIES, close, family, stepwise
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused import implementation as engine
from deliberate.executors.fused.backbone import FusedBackbone, FusedReader
from deliberate.executors.fused.programs import Programs, missing_compiler
from deliberate.executors.select import choose_executor
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitReader
from deliberate.modeling.measures import MEASURES
from deliberate.utils.errors import DeliberateError


def eager(model, **settings) -> FusedBackbone:
    return FusedBackbone(model, engine="eager", **settings)


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_keys_equal_the_generic_executor(name):
    model, ids = family(name), random_ids(20)
    theirs, their_cache = stepwise(Backbone(model), ids)
    ours, our_cache = stepwise(eager(model), ids)
    assert close(ours, theirs)
    for layer in range(4):
        for mine, other in zip(our_cache.states(layer), their_cache.states(layer), strict=True):
            assert close(mine, other)
    if "dynamic" not in name:  # its frequencies follow the length: a pass at once differs
        assert close(ours, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_ragged_rows_equal_the_generic_executor(name):
    model, ids = family(name), random_ids(24, batch=3)
    made = []
    for backbone in (Backbone(model), eager(model)):
        with torch.inference_mode():
            cache = backbone.new_cache(8, 3)
            ctx = backbone.context(0, 14, device="cpu")
            backbone.run_layers(backbone.embed(ids[:, :14], ctx), 0, 4, ctx, cache)
            for row, held in enumerate((14, 9, 4)):
                cache.crop(held, row)
            # Some rows, each from its own position, padded on the right.
            rows, starts, counts = (0, 2), (14, 4), (2, 5)
            ctx = backbone.pass_context(rows, starts, counts, batch=3)
            hidden = backbone.embed(ids[[0, 2], 14:19], ctx)
            first = backbone.run_layers(hidden, 0, 4, ctx, cache)
            # Two rows swap out; one token each of all that are left.
            cache.keep((2, 1))
            ctx = backbone.pass_context((0, 1), (9, 9), (1, 1), batch=2)
            second = backbone.run_layers(backbone.embed(ids[:2, 20:21], ctx), 0, 4, ctx, cache)
            lengths = [cache.row_lengths(row) for row in range(2)]
        made.append((first[0, :2], first[1], second, lengths))
    for mine, other in zip(made[1][:3], made[0][:3], strict=True):
        assert close(mine, other)
    assert made[1][3] == made[0][3] == [[10] * 4, [10] * 4]


def test_slots_that_hold_nothing_are_not_seen():
    model, ids = family("llama"), random_ids(12)
    made = []
    for backbone in (Backbone(model), eager(model)):
        with torch.inference_mode():
            cache = backbone.new_cache()
            ctx = backbone.context(0, 11, device="cpu")
            backbone.run_layers(backbone.embed(ids[:, :11], ctx), 0, 4, ctx, cache)
            holes = torch.zeros(1, 12, dtype=torch.bool)
            holes[0, 5] = True
            ctx = backbone.pass_context((0,), (11,), (1,), batch=1, holes=holes)
            made.append(backbone.run_layers(backbone.embed(ids[:, 11:], ctx), 0, 4, ctx, cache))
    assert close(made[1], made[0])


@pytest.mark.parametrize("name", ["llama tied, with biases", "qwen3"])
def test_skipped_layers_get_the_same_keys_from_one_state(name):
    model = family(name)
    hidden = torch.randn(1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    held = []
    for backbone in (Backbone(model), eager(model)):
        with torch.inference_mode():
            cache = backbone.new_cache()
            ctx = backbone.context(0, 1, device="cpu")
            backbone.fill_layers(hidden, 1, 4, ctx, cache)
        assert cache.lengths == [0, 1, 1, 1]
        held.append([part for layer in (1, 2, 3) for part in cache.states(layer)])
    for mine, other in zip(held[1], held[0], strict=True):
        assert close(mine, other)


def test_what_stands_behind_the_end_of_a_row_does_not_matter():
    model, ids = family("llama"), random_ids(20)
    clean, _ = stepwise(eager(model), ids)
    backbone = eager(model)
    make = backbone.new_cache

    def poisoned(capacity: int = 0, batch: int = 1):
        cache = make(capacity, batch)
        for pair in cache.buffers(0, 4):
            for buffer in pair:
                buffer.fill_(1e30)
        return cache

    backbone.new_cache = poisoned
    assert torch.equal(stepwise(backbone, ids)[0], clean)


@pytest.mark.parametrize(
    ("fidelity", "kv_mode"),
    [
        ("exact", "defer"),  # exact mode takes no other
        *[(f, mode) for f in ("dense", "threshold") for mode in ("defer", "propagate", "skip")],
    ],
)
def test_generations_equal_those_of_the_generic_executor(fidelity, kv_mode):
    ids = random_ids(9, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 20, "fidelity": fidelity, "thresholds": 0.05, "kv_mode": kv_mode}
    made = []
    for executor in ("generic", "fused"):
        base = tiny_model("llama", layers=5)
        engine = "eager" if executor == "fused" else None
        adaptive = AdaptiveModel(base, [1, 2, 3], executor=executor, engine=engine)
        adaptive.backbone = adaptive.backbone  # batches too by the executor under test
        made.append(adaptive.generate(ids[:1], **settings))
        made.append(adaptive.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])


# -- weights ---------------------------------------------------------------------------------------


def test_joined_weights_are_the_models_own_memory():
    model, ids = family("qwen2"), random_ids(6)
    before, parameters = model(ids).logits, dict(model.named_parameters())
    fused = eager(model)
    assert close(model(ids).logits, before, 1e-6)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    own = {p.untyped_storage().data_ptr() for p in parameters.values()}
    for layer in fused._weights:
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert matrix.weight.untyped_storage().data_ptr() in own
    again = eager(model)  # joins nothing a second time
    assert again._weights[0].qkv.weight.data_ptr() == fused._weights[0].qkv.weight.data_ptr()


def test_training_and_saving_go_on_with_joined_weights(tmp_path):
    model, ids = family("llama"), random_ids(6)
    fused = eager(model)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    model.eval()
    assert fused.refresh() is False  # written in place: nothing to take up
    assert close(stepwise(fused, random_ids(20))[0], stepwise(Backbone(model), random_ids(20))[0])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    mine = model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("settings", [{"share": False}, {"weights": "bf16"}, {"weights": "int8"}])
def test_copies_of_weights_follow_the_model(settings):
    model, ids = family("llama"), random_ids(20)
    fused = eager(model, **settings)
    before, _ = stepwise(fused, ids)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.mul_(-1)
        model.lm_head.weight.mul_(2)
    after, _ = stepwise(fused, ids)  # a new cache takes the change up
    assert not close(after, before, 1e-2)
    assert close(after, stepwise(eager(model, **settings), ids)[0])


def test_moved_weights_are_taken_up():
    model, ids = family("llama"), random_ids(20)
    fused = eager(model)
    expected, _ = stepwise(fused, ids)
    model.float()
    made, _ = stepwise(fused, ids)
    assert made.dtype == torch.float32 and close(made.double(), expected, 1e-4)


# -- choice ----------------------------------------------------------------------------------------


def test_the_fused_executor_is_taken_where_it_can_be():
    chosen, reason = choose_executor(family("qwen3"), engine="eager")
    assert isinstance(chosen, FusedBackbone)
    assert reason == "fused: qwen3, eager, engine=eager was asked for"
    chosen, reason = choose_executor(family("qwen3"), "generic")
    assert type(chosen) is Backbone and reason == "generic: asked for"


def adapter(model):
    layer = model.model.layers[1].self_attn
    layer.v_proj = torch.nn.Sequential(layer.v_proj)


def hook(model):
    model.model.layers[3].mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        ("gpt2", None, "architecture gpt2 is not one of llama, mistral, qwen2, qwen3"),
        ("llama", adapter, "layer 1 has a v_proj that is not a plain linear layer (Sequential)"),
        ("llama", hook, "layer 3 has a hook on its LlamaMLP"),
    ],
)
def test_everything_else_falls_back_by_name(architecture, change, reason):
    model = tiny_model(architecture)
    if change is not None:
        change(model)
    chosen, why = choose_executor(model)
    assert type(chosen) is Backbone and why == f"generic: {reason}"
    for settings in ({"executor": "fused"}, {"weights": "int8"}):
        with pytest.raises(DeliberateError) as error:
            choose_executor(model, **settings)
        assert str(error.value).endswith(reason) and "\n" not in str(error.value)


def test_an_unknown_executor_is_an_error():
    with pytest.raises(DeliberateError, match="executor 'vllm' is unknown; it is one of auto"):
        choose_executor(family("llama"), "vllm")


def test_an_engine_that_cannot_be_had_is_an_error():
    with pytest.raises(DeliberateError, match="engine 'cuda' is unknown; it is one of native"):
        by_engine(family("llama"), "cuda")
    with pytest.raises(DeliberateError, match=r"'native' cannot be had here: .*float64") as error:
        by_engine(family("llama"), "native")
    assert "\n" not in str(error.value)


def by_engine(model, engine: str) -> FusedBackbone:
    return FusedBackbone(model, engine=engine)


# -- compilation -----------------------------------------------------------------------------------


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_compiled_generations_equal_eager_ones_and_nothing_is_compiled_twice():
    prompts = [random_ids(length, seed=length) for length in (3, 30, 90)]

    def generations(adaptive):
        return [
            adaptive.generate(prompt, fidelity=fidelity, max_new_tokens=30, thresholds=0.02)
            for fidelity in ("dense", "exact")
            for prompt in prompts
        ]

    def adaptive(executor, engine=None):
        base = tiny_model("llama", layers=2, dtype=torch.float32)
        return AdaptiveModel(base, [1], executor=executor, engine=engine)

    expected = generations(adaptive("generic"))
    model = adaptive("fused", "inductor")
    programs = model.backbone.programs
    model.reader()
    model.backbone.new_cache()
    # One token, a few, more: a run of layers, and the head; all layers for one token; an exit.
    assert programs.reason is None and len(programs) == 8
    with torch._dynamo.config.patch(error_on_recompile=True):
        made = generations(model)
        # States from elsewhere: made outside inference mode, or cut out of something larger.
        for states in (torch.randn(1, 3, 32), torch.randn(1, 3, 64)[..., 32:]):
            cache, ctx = model.backbone.new_cache(), model.backbone.context(0, 3, device="cpu")
            model.backbone.run_layers(states, 0, 2, ctx, cache)
            model.reader().evaluate(0, states[:, -1], 0.5)
            model.backbone.logits(states)
    assert programs.reason is None and len(programs) == 8
    assert all(torch.equal(mine, other) for mine, other in zip(made, expected, strict=True))


def test_a_failing_compiler_is_named_and_everything_runs_eagerly(monkeypatch):
    model, ids = family("llama"), random_ids(20)
    expected, _ = stepwise(eager(model), ids)
    monkeypatch.setattr(engine, "missing_compiler", lambda: None)

    def broken(function, **_settings):
        def fail(*_arguments):
            raise RuntimeError("g++: fatal error\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    fused = FusedBackbone(model)
    made, _ = stepwise(fused, ids)
    assert torch.equal(made, expected)
    assert fused.programs.reason == "compilation failed: g++: fatal error"


def test_a_mistake_in_the_arguments_is_not_taken_for_the_compilers(monkeypatch):
    programs = Programs()

    def half(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    monkeypatch.setattr(torch, "compile", lambda function, **_settings: function)
    with pytest.raises(RuntimeError):
        programs.run("half", half, (torch.ones(2, 3),), lambda: [])
    assert programs.reason is None


def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_compiler() == "no C++ compiler is found (no-such-compiler)"


# -- exits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("translator", ["low_rank", "full", "none"])
@pytest.mark.parametrize("measure", list(MEASURES))
def test_exits_read_the_same_through_the_executor(measure, translator, folded):
    exits = ExitConfig.build(4, [1, 2], measure=measure, translator=translator, rank=3)
    adaptive = AdaptiveModel(tiny_model("llama"), exits)
    with torch.no_grad():
        for parameter in adaptive.exits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    backbone = eager(adaptive.base, boundaries=(1, 2))
    model_bytes = 10**9 if folded else 0
    plain = ExitReader(
        adaptive.exits,
        backbone.norm,
        backbone.lm_head,
        Backbone(adaptive.base).head_logits,
        backbone.softcap,
        model_bytes=model_bytes,
    )
    fused = FusedReader(adaptive.exits, backbone, model_bytes=model_bytes)
    states = torch.randn(3, 32, dtype=torch.float64)
    for index in range(2):
        theirs, ours = (reader.evaluate(index, states, 0.3) for reader in (plain, fused))
        assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-6)
        for row in range(3):
            assert ours.token(row) == theirs.token(row)
            assert ours.logits(row).shape == (VOCAB,)
            assert close(ours.logits(row), theirs.logits(row))
