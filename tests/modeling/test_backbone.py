from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, MAX_POSITIONS, WINDOW, random_ids, tiny_model
from transformers import DynamicCache, OPTConfig, OPTForCausalLM
from transformers.masking_utils import eager_mask, sdpa_mask, sliding_window_causal_mask_function

from deliberate.cache.attention_metadata import FULL, SLIDING
from deliberate.modeling import architectures
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

# Norms and eager softmax compute in float32 even in a float64 model, and a last-bit difference of
# two ways to sum can flip a rounding there.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}

CASES = [
    (arch, implementation)
    for arch in ARCHITECTURES
    for implementation in ("sdpa", "eager")
    if (arch, implementation) != ("gemma2", "sdpa")  # sdpa cannot softcap
]
every_case = pytest.mark.parametrize(("arch", "implementation"), CASES)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def run(view, ids, start, cache, first=0, last=None, hidden=None):
    """Hidden states after layers first..last-1 of the tokens ``ids`` at position ``start``."""
    last = view.num_layers if last is None else last
    ctx = view.context(start, ids.shape[1], device="cpu")
    hidden = view.embed(ids, ctx) if hidden is None else hidden
    return view.run_layers(hidden, first, last, ctx, cache)


def decode(view, ids, sizes, cache=None, start=0):
    """Logits of ``ids``, passed in consecutive chunks of the given sizes."""
    cache = view.new_cache(batch=ids.shape[0]) if cache is None else cache
    pieces = []
    for size in sizes:
        pieces.append(view.logits(run(view, ids[:, start : start + size], start, cache)))
        start += size
        cache.check()
    return torch.cat(pieces, dim=1)


def assert_same_states(view, cache, reference):
    assert cache.lengths == reference.lengths
    for layer in range(view.num_layers):
        for states, expected in zip(cache.states(layer), reference.states(layer), strict=True):
            torch.testing.assert_close(states, expected, **CLOSE)


@every_case
def test_full_pass_logits_equal_transformers(arch, implementation):
    model = tiny_model(arch, attn_implementation=implementation)
    ids = random_ids(3 * WINDOW, batch=2)
    ours = decode(Backbone(model), ids, [ids.shape[1]])
    torch.testing.assert_close(ours, model(ids).logits, rtol=1e-9, atol=1e-9)


@every_case
def test_prefill_steps_and_chunks_equal_the_full_pass(arch, implementation):
    model = tiny_model(arch, attn_implementation=implementation)
    sizes = [2 * WINDOW + 3, *[1] * 7, 5, 1, WINDOW + 2, 2, 1]
    ids = random_ids(sum(sizes))
    ours = decode(Backbone(model), ids, sizes)
    torch.testing.assert_close(ours, model(ids).logits, **CLOSE)


@every_architecture
def test_steps_through_the_edge_of_the_window_equal_the_full_pass(arch):
    model = tiny_model(arch)
    sizes = [1] * (WINDOW + 4)
    ids = random_ids(len(sizes))
    torch.testing.assert_close(decode(Backbone(model), ids, sizes), model(ids).logits, **CLOSE)


@every_architecture
def test_upper_layers_run_later_for_several_tokens_give_the_same_logits_and_kv(arch):
    view = Backbone(tiny_model(arch))
    prompt, later = 2 * WINDOW + 3, 6
    ids = random_ids(prompt + later)
    dense = view.new_cache()
    expected = decode(view, ids, [prompt, *[1] * later], dense)[:, prompt:]

    cache = view.new_cache()
    run(view, ids[:, :prompt], 0, cache)
    pending = [
        run(view, ids[:, at : at + 1], at, cache, last=2) for at in range(prompt, prompt + later)
    ]
    assert cache.lengths == [prompt + later] * 2 + [prompt] * 2
    cache.check()
    hidden = run(view, ids[:, prompt:], prompt, cache, first=2, hidden=torch.cat(pending, dim=1))
    torch.testing.assert_close(view.logits(hidden), expected, **CLOSE)
    assert_same_states(view, cache, dense)


@every_architecture
def test_crop_then_decode_equals_a_fresh_pass(arch):
    view = Backbone(tiny_model(arch))
    rejected, ids = random_ids(30, seed=1), random_ids(30)
    kept = 2 * WINDOW + 1
    cache = view.new_cache()
    decode(view, torch.cat([ids[:, :kept], rejected[:, kept:]], dim=1), [kept, 3, 1, 1], cache)
    cache.crop(kept)
    again = decode(view, ids, [1, 4, 1], cache, start=kept)
    fresh = view.new_cache()
    expected = decode(view, ids, [kept, 1, 4, 1], fresh)[:, kept:]
    torch.testing.assert_close(again, expected, **CLOSE)
    assert_same_states(view, cache, fresh)


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox_residuals_equal_transformers(parallel):
    model = tiny_model("gpt_neox", use_parallel_residual=parallel)
    ids = random_ids(20)
    torch.testing.assert_close(decode(Backbone(model), ids, [12, 1, 7]), model(ids).logits, **CLOSE)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_equal_transformers(arch, dtype):
    model = tiny_model(arch, dtype=dtype)
    view = Backbone(model)
    ids = random_ids(2 * WINDOW)
    expected = model(ids).logits
    torch.testing.assert_close(decode(view, ids, [ids.shape[1]]), expected, rtol=0, atol=0)
    stepped = decode(view, ids, [WINDOW, *[1] * WINDOW])
    assert stepped.dtype == dtype
    scale = float(expected.float().std())
    tolerance = scale * (1e-4 if dtype == torch.float32 else 0.25)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=tolerance)


def test_mixed_layer_types_each_get_their_own_mask():
    types = [FULL, SLIDING, SLIDING, FULL]
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=5, layer_types=types)
    view = Backbone(model)
    ids = random_ids(20)
    assert list(view.layer_types) == types
    torch.testing.assert_close(decode(view, ids, [9, 1, 1, 4, 5]), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("start", "q"), [(0, 7), (0, 8), (0, 9), (7, 1), (8, 1), (5, 3), (5, 4)])
def test_window_masks_equal_transformers_own(implementation, start, q):
    view = Backbone(tiny_model("mistral", attn_implementation=implementation))
    build = sdpa_mask if implementation == "sdpa" else eager_mask
    expected = build(
        batch_size=1,
        q_length=q,
        kv_length=start + q,
        q_offset=start,
        mask_function=sliding_window_causal_mask_function(WINDOW),
        allow_is_causal_skip=False,
        dtype=torch.float64,
    )
    mask = view.context(start, q, device="cpu").masks[SLIDING]
    if mask is None:  # only where attention is right without one
        if implementation == "sdpa" and start == 0:
            assert torch.equal(expected[0, 0], torch.ones(q, q, dtype=torch.bool).tril())
        else:
            assert q == 1
            assert expected.all() if expected.dtype == torch.bool else not expected.any()
    else:
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_single_step_inside_the_window_makes_no_mask(implementation):
    view = Backbone(tiny_model("mistral", attn_implementation=implementation))
    inside, outside = (view.context(at, 1, device="cpu") for at in (WINDOW - 1, WINDOW))
    assert set(inside.masks.values()) == {None}
    assert outside.masks[SLIDING] is not None
    full = Backbone(tiny_model("llama", attn_implementation=implementation))
    assert set(full.context(90, 1, device="cpu").masks.values()) == {None}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_equals_transformers(rope):
    model = tiny_model("llama", rope_parameters={"rope_theta": 1e4, **rope})
    ids = random_ids(60)
    torch.testing.assert_close(
        decode(Backbone(model), ids, [40, 1, 1, 18]), model(ids).logits, **CLOSE
    )


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        (
            "llama",
            {
                "max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 16,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0, 1.1, 1.2, 1.3],
                    "long_factor": [2.0, 3.0, 4.0, 5.0],
                },
            },
        ),
    ],
)
def test_rope_that_follows_the_length_treats_a_chunk_as_single_steps(arch, settings):
    ids = random_ids(24)
    ours = decode(Backbone(tiny_model(arch, **settings)), ids, [10, 14])
    # A second instance: the module of the dynamic type remembers the longest sequence it has met.
    model = tiny_model(arch, **settings)
    cache = DynamicCache(config=model.config)
    steps = [ids[:, :10], *ids[:, 10:].split(1, dim=1)]
    expected = [model(step, past_key_values=cache, use_cache=True).logits for step in steps]
    torch.testing.assert_close(ours, torch.cat(expected, dim=1), **CLOSE)


def test_the_rotary_table_grows_with_the_positions_of_a_pass():
    model = tiny_model("llama")
    view = Backbone(model)
    view.context(0, 4, device="cpu")
    far = view.context(1000, 3, device="cpu")
    expected = model.model.rotary_emb(torch.empty(0, dtype=torch.float64), far.positions)
    assert far.positions.tolist() == [[1000, 1001, 1002]]
    for got, want in zip(far.position_embeddings, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_model_moved_to_another_dtype_gets_tables_in_it():
    view = Backbone(tiny_model("llama"))
    view.context(0, 4, device="cpu")
    view.model.to(torch.float32)
    assert view.context(0, 4, device="cpu").position_embeddings[0].dtype == torch.float32


def test_contexts_first_made_in_inference_mode_serve_a_pass_with_gradients():
    with torch.inference_mode(False):
        view = Backbone(tiny_model("llama"))
        ids = random_ids(5)
    view.context(0, 5, device="cpu")
    with torch.inference_mode(False):
        view.logits(run(view, ids, 0, view.new_cache())).sum().backward()
        assert view.model.get_input_embeddings().weight.grad is not None


def test_the_view_names_the_models_own_parts():
    model = tiny_model("gpt2", layers=3)
    view = Backbone(model)
    assert (view.architecture, view.num_layers, view.hidden_size) == ("gpt2", 3, 32)
    assert (view.vocab_size, view.max_positions) == (97, MAX_POSITIONS)
    assert view.layers is model.transformer.h
    assert view.norm is model.transformer.ln_f
    assert view.lm_head is model.lm_head


@every_architecture
def test_only_the_layers_of_a_pass_are_called(arch):
    view = Backbone(tiny_model(arch))
    called = []
    for index, layer in enumerate(view.layers):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    run(view, random_ids(3), 0, view.new_cache(), last=2)
    assert called == [0, 1]


def test_a_pass_that_does_not_follow_the_cache_is_refused():
    view = Backbone(tiny_model("llama"))
    cache = view.new_cache()
    run(view, random_ids(5), 0, cache, last=2)
    with pytest.raises(
        RuntimeError, match=r"position 5 of row 0 through layers 0\.\.3 meets 5\.\.0"
    ):
        run(view, random_ids(1), 5, cache)


def test_supported_architectures_are_those_tested():
    assert sorted(ARCHITECTURES) == list(architectures.ARCHITECTURES)


def _opt():
    config = OPTConfig(
        vocab_size=97, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    return OPTForCausalLM(config)


def _with(arch, **changes):
    model = tiny_model(arch, layers=1)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_opt, r"'opt' is not supported: OPTModel has the parts decoder"),
        (lambda: _with("llama", _attn_implementation="flash_attention_2"), "flash_attention_2"),
        (lambda: _with("llama", _attn_implementation="flex_attention"), "flex_attention"),
        (lambda: _with("gemma2", _attn_implementation="sdpa"), 'attn_implementation="eager"'),
        (lambda: _with("gemma2", use_bidirectional_attention=True), "both directions"),
        (lambda: _with("qwen2", layer_types=["chunked_attention"]), "chunked_attention"),
        (lambda: _with("qwen2", layer_types=[SLIDING]), "sliding_window is None"),
        (lambda: tiny_model("llama", layers=1).base_model, "AutoModelForCausalLM"),
    ],
)
def test_an_unsupported_model_is_refused_in_one_line(build, message):
    with torch.inference_mode(False), pytest.raises(DeliberateError, match=message) as caught:
        Backbone(build())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "q", "message"),
    [(MAX_POSITIONS, 1, "129 tokens do not fit"), (0, 0, "q >= 1"), (-1, 1, "start >= 0")],
)
def test_impossible_passes_are_refused_in_one_line(start, q, message):
    with pytest.raises(DeliberateError, match=message):
        Backbone(tiny_model("gpt2", layers=1)).context(start, q, device="cpu")
