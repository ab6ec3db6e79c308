"""Keys and values of a batch: the caller's cache, and what the layers get that a token skips."""

from __future__ import annotations

import itertools

import pytest
import torch
from batch_decoding import alone, make_loop, prompts, together, tokens
from tiny_models import ARCHITECTURES, left_padded, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity, KVMode


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("fidelity", ["exact", "threshold"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_callers_cache_ends_as_transformers_leaves_it(arch, fidelity, kind):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    # transformers' own eager attention goes wrong on padded rows behind a sliding window.
    ids, mask = left_padded([13, 13] if arch == "gemma2" else [13, 5])

    def cache():
        if kind == "static":
            return StaticCache(config=model.base.config, max_cache_len=64)
        return DynamicCache(config=model.base.config)

    stock, ours = cache(), cache()
    # In threshold mode no token exits, so that the output is the dense one.
    settings = {"thresholds": 1.0 if fidelity == "threshold" else 0.013}
    common = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.base.generate(ids, past_key_values=stock, do_sample=False, **common)
    made = model.generate(
        ids, past_key_values=ours, fidelity=fidelity, online=False, **settings, **common
    )
    assert torch.equal(made, expected)
    assert int(ours.get_seq_length()) == int(stock.get_seq_length()) == 13 + 12 - 1
    # What matters of a cache is what comes of it: the next turn, decoded by transformers itself.
    more = torch.cat((expected, random_ids(3, batch=2)), dim=1)
    wide = torch.cat((mask, torch.ones(2, 12 + 3, dtype=torch.int64)), dim=1)
    next_turn = {"attention_mask": wide, "max_new_tokens": 6, "pad_token_id": 0}
    after = [
        model.base.generate(more, past_key_values=held, do_sample=False, **next_turn)
        for held in (stock, ours)
    ]
    assert torch.equal(*after)


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_a_conversation_goes_on_from_the_callers_cache(arch):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    ids = random_ids(14, seed=3)
    cache = DynamicCache(config=model.base.config)
    first = model.generate(ids, past_key_values=cache, thresholds=0.013, max_new_tokens=9)
    more = torch.cat((first, random_ids(4, seed=9)), dim=1)
    went_on = model.generate(more, past_key_values=cache, thresholds=0.013, max_new_tokens=9)
    assert torch.equal(went_on, model.generate(more, fidelity="dense", max_new_tokens=9))
    assert int(cache.get_seq_length()) == more.shape[1] + 9 - 1


# -- modes of the missing KV ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("mode", [KVMode.PROPAGATE, KVMode.SKIP])
def test_lossy_modes_equal_dense_while_no_token_exits(arch, mode):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    ids, mask = left_padded([4, 11])
    out = together(model, ids, mask, "threshold", thresholds=1.0, kv_mode=mode, max_new_tokens=12)
    assert tokens(out) == alone(model, ids, mask, max_new_tokens=12)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_propagated_keys_are_those_of_the_exit_state_in_every_layer_above(arch):
    model = AdaptiveModel(tiny_model(arch, layers=4), [2])
    loop = make_loop(
        model,
        Fidelity.THRESHOLD,
        kv_mode=KVMode.PROPAGATE,
        decide=lambda *_: True,
        max_new_tokens=3,
    )
    list(loop.run(prompts(5)))
    backbone = model.backbone
    # By hand: all layers for the prompt, then two layers, whose output the others project.
    with torch.inference_mode():
        cache = backbone.new_cache()
        ctx = backbone.context(0, 5, device="cpu")
        hidden = backbone.embed(prompts(5)[0].unsqueeze(0), ctx)
        backbone.run_layers(hidden, 0, 4, ctx, cache)
        ctx = backbone.context(5, 1, device="cpu")
        hidden = backbone.embed(torch.tensor([[loop.trace.tokens[0]]]), ctx)
        state = backbone.run_layers(hidden, 0, 2, ctx, cache)
        backbone.run_layers(state, 2, 3, ctx, cache)  # an ordinary pass writes the same keys
    for ours, expected in zip(loop.cache.states(2), cache.states(2), strict=True):
        torch.testing.assert_close(ours[:, :, :6], expected)
    assert loop.cache.lengths == [7] * 4


def test_layers_above_an_exit_decode_without_the_tokens_that_skipped_them(llama):
    exits = itertools.cycle([True, False])
    loop = make_loop(
        llama,
        Fidelity.THRESHOLD,
        kv_mode=KVMode.SKIP,
        decide=lambda *_: next(exits),
        max_new_tokens=3,
    )
    list(loop.run(prompts(5)))
    made = loop.trace.tokens
    assert loop.trace.exit_layers == [6, 2, 6]  # the second token exited at layer 2
    # By hand, without any mask: the token after it meets upper layers that hold the prompt only.
    backbone = llama.backbone
    cache = DynamicCache(config=llama.base.config)
    with torch.inference_mode():
        prompt = backbone.context(0, 5, device="cpu")
        hidden = backbone.embed(prompts(5)[0].unsqueeze(0), prompt)
        for layer in backbone.layers:
            hidden = layer(
                hidden, past_key_values=cache, position_embeddings=prompt.position_embeddings
            )
        for position, token, last in ((5, made[0], 2), (6, made[1], 6)):
            ctx = backbone.context(position, 1, device="cpu")
            hidden = backbone.embed(torch.tensor([[token]]), ctx)
            for layer in backbone.layers[:last]:
                hidden = layer(
                    hidden, past_key_values=cache, position_embeddings=ctx.position_embeddings
                )
    assert int(backbone.logits(hidden[:, -1]).argmax()) == made[2]


def test_lossy_modes_differ_from_defer_once_tokens_exit(llama):
    ids, mask = left_padded([4, 11, 7], seed=5)

    def made(mode: KVMode) -> list:
        script = itertools.cycle([True, True, False, False])
        out = together(
            llama,
            ids,
            mask,
            "threshold",
            decide=lambda *_: next(script),
            kv_mode=mode,
            max_new_tokens=30,
        )
        return tokens(out)

    deferred, propagated, skipped = (made(mode) for mode in KVMode)
    assert deferred != propagated
    assert deferred != skipped
    assert propagated != skipped
