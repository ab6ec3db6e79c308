"""Caches of transformers, handed in and handed back: every class, architecture and turn length."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, WINDOW, random_ids, tiny_model
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from deliberate.api.hf_cache import from_transformers
from deliberate.api.model import AdaptiveModel
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

LAYERS = 2
LENGTH = 2 * WINDOW + 6
# Where the window fills, is full, and has been full for long.
HELD = [1, WINDOW // 2, *range(WINDOW - 2, WINDOW + 3), 2 * WINDOW - 1, 2 * WINDOW, 2 * WINDOW + 1]

# What a caller may hand in, by class, made for a model.
CACHES = {
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "DynamicCache, no configuration": lambda model: DynamicCache(),
    "DynamicCache, recording": lambda model: recording(DynamicCache(config=model.config)),
    "StaticCache": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "StaticCache, just large enough": lambda model: StaticCache(
        config=model.config, max_cache_len=LENGTH
    ),
    "Cache": lambda model: Cache(layer_class_to_replicate=DynamicLayer),
}
REFUSED = {
    "EncoderDecoderCache": lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "QuantizedCache": lambda model: QuantizedCache("fp8", model.config),
    "MtpCache": lambda model: cache_utils.MtpCache(),
    "DFlashCache": lambda model: cache_utils.DFlashCache(),
}


def installed(kind: str) -> bool:
    """Whether this version of transformers has the cache, and what the test makes it of."""
    needed = {"QuantizedCache": "Fp8QuantizedLayer"}.get(kind, kind)
    return hasattr(cache_utils, kind) and hasattr(cache_utils, needed)


# Layer classes that a `Cache` can be built of, and whether the loop reads them.
READ = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "StaticIndexedLayer",
}
REFUSED_LAYERS = {
    "DummyLayer",
    "QuantizedLayer",
    "BaseQuantizedLayer",
    "QuantoQuantizedLayer",
    "HQQQuantizedLayer",
    "Fp8QuantizedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
}


def recording(cache: Cache) -> Cache:
    cache.activate_past_recording()
    return cache


@functools.cache
def stock(arch: str):
    overrides = {"n_inner": 16} if arch == "gpt2" else {}
    heads = {} if arch in ("gpt2", "gpt_neox") else {"num_key_value_heads": 1}
    if arch in ("qwen2", "phi3"):
        overrides |= {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
        if arch == "phi3":
            overrides = {"sliding_window": WINDOW}
    return tiny_model(
        arch, layers=LAYERS, hidden_size=16, num_attention_heads=2, **heads, **overrides
    )


@functools.cache
def whole(arch: str) -> torch.Tensor:
    with torch.inference_mode():
        return stock(arch)(random_ids(LENGTH, seed=5)).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", CACHES)
def test_every_cache_is_read_where_its_tokens_are_at_every_length_around_the_window(arch, kind):
    model = stock(arch)
    view, ids = Backbone(model), random_ids(LENGTH, seed=5)
    with torch.inference_mode():
        for held in HELD:
            cache = CACHES[kind](model)
            model(ids[:, :held], past_key_values=cache, use_cache=True)
            ours = from_transformers(cache, view, [LENGTH], 1)
            assert ours.lengths == [held] * LAYERS
            ctx = view.context(held, LENGTH - held, device="cpu")
            hidden = view.run_layers(view.embed(ids[:, held:], ctx), 0, LAYERS, ctx, ours)
            torch.testing.assert_close(
                view.logits(hidden), whole(arch)[:, held:], rtol=1e-5, atol=2e-5, msg=f"{held} held"
            )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["DynamicCache", "DynamicCache, no configuration", "StaticCache"])
def test_a_cache_passed_between_transformers_and_us_gives_the_same_turns(arch, kind):
    model = AdaptiveModel(stock(arch), [1])
    cache, ids = CACHES[kind](model.base), random_ids(3)
    stock_cache, expected = CACHES[kind](model.base), ids
    settings = {"max_new_tokens": 2, "do_sample": False}
    for turn in range(5):  # the window fills within the second turn
        who, how = (model, {"thresholds": 0.013, "online": False}) if turn % 2 else (model.base, {})
        ids = who.generate(ids, past_key_values=cache, **settings, **how)
        expected = model.base.generate(expected, past_key_values=stock_cache, **settings)
        assert torch.equal(ids, expected), f"turn {turn}"
        more = random_ids(1 + turn, seed=turn)
        ids, expected = torch.cat((ids, more), 1), torch.cat((expected, more), 1)


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
@pytest.mark.parametrize("held", [2, 5, 7, 8, 9, 12])
def test_padded_rows_are_read_behind_their_padding(kind, arch, held):
    model = AdaptiveModel(stock(arch), [1])
    lengths, width = (11, 4, 8), 13  # no row fills the width, and some begin after what is held
    ids = random_ids(width, batch=3)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    cache = CACHES[kind](model.base)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        model.base(
            ids[:, :held],
            attention_mask=mask[:, :held],
            position_ids=positions[:, :held],
            past_key_values=cache,
        )
    made = model.generate(
        ids, attention_mask=mask, past_key_values=cache, thresholds=0.013, max_new_tokens=6
    )
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], fidelity="dense", max_new_tokens=6)
        assert made[row, width:].tolist() == alone[0, length:].tolist(), f"row {row}"


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if installed(kind)])
def test_a_cache_that_keeps_its_tokens_in_its_own_way_is_refused_by_name(kind):
    model = AdaptiveModel(stock("llama"), [1])
    with pytest.raises(DeliberateError, match=kind) as caught:
        model.generate(random_ids(4), past_key_values=REFUSED[kind](model.base))
    assert "\n" not in str(caught.value)


def test_every_cache_class_of_transformers_is_decided_upon():
    classes = [one for _, one in inspect.getmembers(cache_utils, inspect.isclass)]
    caches = {one.__name__ for one in classes if issubclass(one, Cache)}
    # Earlier versions have fewer.
    assert caches <= {name.split(",")[0] for name in CACHES} | set(REFUSED)
    mixins = tuple(one for one in classes if one.__name__.endswith("CacheLayerMixin"))
    kinds = (*mixins, *(one for one in classes if one.__name__ == "DummyLayer"))
    layers = {one for one in classes if issubclass(one, kinds)} - set(mixins)
    assert {"DynamicLayer"} < {one.__name__ for one in layers} <= READ | REFUSED_LAYERS
    view = Backbone(stock("llama"))
    for kind in layers:
        # Of this class, though it may be abstract or need another package to be built.
        made = type(kind.__name__, (kind,), {"__init__": lambda self: None})
        made.__abstractmethods__ = frozenset()
        made = made()
        made.is_initialized, made.keys, made.cumulative_length = False, None, 0
        made.cumulative_length_int, made.max_cache_len = 0, 64
        cache = Cache(layers=[made] * LAYERS)
        if kind.__name__ in READ:
            assert from_transformers(cache, view, [4], 1) is None
        else:
            with pytest.raises(DeliberateError, match=kind.__name__):
                from_transformers(cache, view, [4], 1)


def filled(model, cache, length=WINDOW + 1, batch=1):
    with torch.inference_mode():
        model(random_ids(length, batch=batch), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: StaticCache(config=model.config, max_cache_len=6), "keeps 6 tokens"),
        (
            lambda model: Cache(
                layers=[DynamicSlidingWindowLayer(sliding_window=4) for _ in range(LAYERS)]
            ),
            "keeps 4 tokens",
        ),
        (
            lambda model: Cache(layers=[StaticSlidingWindowLayer(64, 4) for _ in range(LAYERS)]),
            "keeps 4 tokens",
        ),
        (lambda model: Cache(layers=[StaticLayer(7) for _ in range(LAYERS)]), "keeps 7 tokens"),
        (lambda model: filled(tiny_model("mistral", layers=3), DynamicCache()), "3 layers"),
        (lambda model: filled(tiny_model("mistral", layers=LAYERS), DynamicCache()), "head size"),
        (lambda model: filled(model, DynamicCache(), batch=2), "head size"),
        (lambda model: filled(model, DynamicCache(), 12), "at least one token more"),
        (lambda model: filled(stock("mistral"), DynamicCache()).layers, "list"),
    ],
)
def test_a_cache_that_cannot_be_the_beginning_of_the_prompt_is_refused(make, words):
    model = stock("mistral")
    with pytest.raises(DeliberateError) as caught:
        from_transformers(make(model), Backbone(model), [12], 3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_of_another_dtype_is_promoted_as_transformers_does_or_refused():
    model = stock("mistral")
    cache = filled(model, DynamicCache())
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    ours = from_transformers(cache, Backbone(model), [12], 1)
    assert ours.states(0)[0].dtype == torch.float64
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    single = tiny_model(
        "mistral",
        layers=LAYERS,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        dtype=torch.float32,
    )
    with pytest.raises(DeliberateError, match="float64"):
        from_transformers(cache, Backbone(single), [12], 1)


def test_the_caller_cannot_overfill_a_static_cache():
    model = AdaptiveModel(stock("llama"), [1])
    cache = StaticCache(config=model.base.config, max_cache_len=10)
    with pytest.raises(DeliberateError, match="keeps 10 tokens"):
        model.generate(random_ids(4), past_key_values=cache, max_new_tokens=8)
    made = model.generate(random_ids(4), past_key_values=cache, max_new_tokens=7)
    assert made.shape[1] == 11 and int(cache.get_seq_length()) == 10
    assert int(made.max()) < VOCAB
