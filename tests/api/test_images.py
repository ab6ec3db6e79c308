"""A vision-language model decodes adaptively what its own `generate` decodes, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from seeing_models import IMAGE, seeing, shown
from tiny_models import tiny_model
from transformers import DynamicCache

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.modeling.seen_rows import SeenRows, positions_of
from deliberate.utils.errors import DeliberateError

GREEDY = {"max_new_tokens": 14, "do_sample": False}
ADAPTIVE = {**GREEDY, "thresholds": 0.02}


@pytest.mark.parametrize("name", ["smolvlm", "idefics2", "idefics3", "llava", "mistral3"])
def test_dense_and_exact_are_the_models_own_generate(name):
    whole = seeing(name)
    given = shown(name, rows=2)
    given["input_ids"][1, 0], given["attention_mask"][1, 0] = 0, 0  # the second is shorter
    plain = whole.generate(**given, **GREEDY)
    model = AdaptiveModel(whole, [1, 2])
    for fidelity in ("dense", "exact"):
        made = model.generate(**given, fidelity=fidelity, return_dict_in_generate=True, **ADAPTIVE)
        assert torch.equal(made.sequences, plain), fidelity
        early = [one.exit_layer < 4 for trace in made.traces for one in trace.records]
        assert any(early) == (fidelity == "exact")
    assert model.sight.encoded == 1  # the second time it knew the images
    other = model.see(**{**given, **{"pixel_values": -given["pixel_values"]}})
    assert not torch.equal(other, model.see(**given)) and model.sight.encoded == 2


def test_the_compiled_executor_runs_a_llama_tower():
    whole = seeing("smolvlm", torch.float32)
    given = shown("smolvlm", dtype=torch.float32)
    plain = whole.generate(**given, **GREEDY)
    model = AdaptiveModel(whole, [1, 2])
    assert model.executor.startswith("fused: llama")
    assert torch.equal(model.generate(**given, fidelity="exact", **ADAPTIVE), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
        {"no_repeat_ngram_size": 2},
    ],
)
def test_processors_and_repeated_prompts_see_the_processors_own_ids(settings):
    model = AdaptiveModel(seeing("llava"), [1, 2])
    wanted = {**shown("llava"), **ADAPTIVE, "seed": 3, **settings}
    dense = model.generate(**wanted, fidelity="dense")
    assert torch.equal(model.generate(**wanted, fidelity="exact"), dense)
    assert int(dense.max()) < 97 and bool((dense[:, 2:18] == IMAGE).all())


def test_an_engine_shares_a_prefix_where_the_image_is_the_same():
    model = AdaptiveModel(seeing("llava"), [1, 2])
    first, second = shown("llava"), shown("llava")
    second["pixel_values"] = second["pixel_values"] + 1
    cache = model.backbone_for(2).new_block_cache(60, block_size=4, max_rows=2)
    engine = model.engine(max_running=2, cache=cache)
    ran = []
    for given in (first, second, first, copy.deepcopy(second)):
        ids = model.see(**given)
        before, tokens = engine.stats().prefilled, []
        engine.add(Request(ids[0], 6, spec=DecodingSpec(fidelity="exact"), end_tokens=()))
        while engine.unfinished:
            for output in engine.step():
                tokens += output.tokens
        alone = model.generate(**given, max_new_tokens=6, do_sample=False, fidelity="dense")
        assert tokens == alone[0, ids.shape[1] :].tolist()
        ran.append(engine.stats().prefilled - before)
    # 22 tokens, blocks of 4: before the image there is no full block, so nothing is shared.
    assert ran == [22, 22, 2, 2] and model.sight.encoded == 2


def test_changed_eyes_look_again():
    model, given = AdaptiveModel(seeing("llava"), [1, 2]), shown("llava")
    before = model.see(**given)
    with torch.no_grad():
        model.base.seeing.model.multi_modal_projector.linear_1.weight.data.mul_(1.5)
    after = model.see(**given)
    assert model.sight.encoded == 2 and not torch.equal(before, after)


def test_images_at_the_positions_of_m_rope_are_placed_as_the_model_places_them():
    whole = seeing("qwen2_vl")
    given = shown("qwen2_vl")
    plain = whole.generate(**given, **GREEDY)
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    model = AdaptiveModel(whole, [1, 2])
    for fidelity in ("dense", "exact"):
        made = model.generate(**given, fidelity=fidelity, return_dict_in_generate=True, **ADAPTIVE)
        assert torch.equal(made.sequences, plain), fidelity
    seen = model.sight.of(model.base, given["input_ids"], None, _pixels(given))
    assert seen.positions is not None and int(seen.positions.max()) < seen.ids.shape[1] - 1
    assert not torch.equal(model.generate(**text, **ADAPTIVE), plain)  # and text as before
    assert torch.equal(model.generate(**text, **ADAPTIVE), whole.generate(**text, **GREEDY))
    with pytest.raises(DeliberateError, match="past_key_values with images at positions of M-RoPE"):
        model.generate(**given, **ADAPTIVE, past_key_values=DynamicCache())
    two = shown("qwen2_vl", rows=2)
    assert torch.equal(model.generate(**two, **ADAPTIVE), whole.generate(**two, **GREEDY))
    two["input_ids"][1, 0], two["attention_mask"][1, 0] = 0, 0
    assert torch.equal(model.generate(**two, **ADAPTIVE), whole.generate(**two, **GREEDY))


def sizes() -> dict:
    """Three prompts for Qwen2-VL: images of 2 x 2 and of 2 x 4, both, and none."""
    both, none = two_images(4), [5, 6, 7]
    ids = both["input_ids"][0].tolist()
    rows = [ids[:9], ids, none, [8, 91, *[IMAGE] * 8, 92, 9]]
    width = max(map(len, rows))
    made = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    pixels = torch.randn(16 + 48 + 32, 12, generator=torch.Generator().manual_seed(6)).double()
    return {
        "input_ids": made,
        "attention_mask": (made != 0).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 8], [1, 4, 8]]),
        "mm_token_type_ids": (made == IMAGE).int(),
    }


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_batch_of_images_of_different_sizes_is_placed_prompt_by_prompt(name, fidelity):
    whole, given = seeing(name), sizes()
    model = AdaptiveModel(whole, [1, 2])
    plain = whole.generate(**given, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**given, fidelity=fidelity, **ADAPTIVE), plain)
    ended = {"eos_token_id": int(plain[0, given["input_ids"].shape[1] + 2]), "pad_token_id": 0}
    stopped = whole.generate(**given, **GREEDY, **ended)  # rows of the cache are numbered anew
    assert not torch.equal(stopped, plain)
    made = model.generate(**given, fidelity=fidelity, **ADAPTIVE, **ended)
    assert torch.equal(made, stopped)
    text = torch.arange(3, 12).unsqueeze(0)  # of the model itself nothing has changed
    assert torch.equal(model.generate(text, **ADAPTIVE), whole.generate(text, **GREEDY))
    twice = {**given, "num_return_sequences": 2, "do_sample": True, "seed": 5}
    made = model.generate(**twice, fidelity=fidelity, thresholds=0.02, max_new_tokens=6)
    dense = model.generate(**twice, fidelity="dense", max_new_tokens=6)
    assert torch.equal(made, dense)


def test_an_image_that_m_rope_places_is_encoded_once_whatever_the_text_around_it():
    whole = seeing("qwen2_vl")
    model = AdaptiveModel(whole, [1, 2])
    for seed, text in enumerate([(3, 2, 4), (1, 5, 2), (3, 2, 4)]):
        given = two_images(seed, text)
        given["pixel_values"] = two_images(9)["pixel_values"]
        plain = whole.generate(**given, **GREEDY)
        assert torch.equal(model.generate(**given, fidelity="exact", **ADAPTIVE), plain), text
    assert model.sight.encoded == 1
    joined = two_images(9, (3, 0, 4))  # the two runs of positions are as they were
    kinds = joined["mm_token_type_ids"].clone()
    kinds[0, 0] = 1  # of a token that is no image's: by the model alone
    with pytest.raises(DeliberateError, match=r"Qwen2VL.* cannot read .*StopIteration"):
        model.see(**{**joined, "mm_token_type_ids": kinds})
    assert model.sight.encoded == 1
    padded = two_images(9)
    padded["attention_mask"][0, 0] = 0
    assert torch.equal(model.generate(**padded, **ADAPTIVE), whole.generate(**padded, **GREEDY))
    assert model.sight.encoded == 2


def two_images(seed: int, text: tuple[int, int, int] = (3, 2, 4)) -> dict:
    """A prompt for Qwen2-VL: text, an image of 2 x 2, text, one of 2 x 4, text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (sum(text),), generator=generator).tolist()
    ids: list[int] = []
    for count, positions in zip(text, (4, 8, 0), strict=True):
        ids += words[:count]
        words = words[count:]
        ids += [91, *[IMAGE] * positions, 92] if positions else []
    made = torch.tensor([ids])
    pixels = torch.randn(16 + 32, 12, generator=generator)
    return {
        "input_ids": made,
        "attention_mask": torch.ones_like(made),
        "pixel_values": pixels.double(),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]]),
        "mm_token_type_ids": (made == IMAGE).int(),
    }


@pytest.mark.parametrize("blocks", [False, True])
def test_requests_of_an_engine_are_placed_each_by_its_own_images(blocks):
    model = AdaptiveModel(seeing("qwen2_vl"), [1, 2])
    cache = None
    if blocks:
        cache = model.backbone_for(2).new_block_cache(80, block_size=4, max_rows=3)
    engine, wanted, made = model.engine(max_running=3, cache=cache), {}, {}
    asked = [shown("qwen2_vl"), two_images(1), None, two_images(2, (1, 5, 1)), two_images(1)]
    for seed, given in enumerate(asked):
        given = given or {"input_ids": torch.randint(3, 90, (1, 8))}
        ids = given["input_ids"] if len(given) == 1 else model.see(**given)
        alone = model.generate(**given, **ADAPTIVE, fidelity="dense")
        spec = DecodingSpec(fidelity="exact", thresholds=0.02 if seed % 2 else None)
        number = engine.add(Request(ids[0], 14, spec=spec, end_tokens=()))
        wanted[number], made[number] = alone[0, ids.shape[1] :].tolist(), []
        if seed == 3:
            for _ in range(4):  # the last one comes while the others decode
                for output in engine.step():
                    made[output.id] += output.tokens
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    assert made == wanted
    text = torch.arange(3, 12).unsqueeze(0)  # of the model itself nothing has changed
    assert torch.equal(model.generate(text, **ADAPTIVE), model.base.seeing.generate(text, **GREEDY))


@pytest.mark.parametrize("text", [(3, 2, 4), (1, 1, 1), (2, 0, 3)])
def test_positions_of_m_rope_follow_from_a_prompts_ids(text):
    model, given = AdaptiveModel(seeing("qwen2_vl"), [1, 2]), two_images(3, text)
    seen = model.sight.of(model.base, given["input_ids"], None, _pixels(given))
    ids = model.see(**given)[0].tolist()
    own = positions_of(ids, model.base.seen.hold(ids))
    assert torch.equal(own, seen.positions[:, 0]) and int(own.max()) < len(ids) - 1
    assert positions_of([5, 6, 7], ()) is None
    cut = positions_of(ids[:-1], model.base.seen.hold(ids))
    assert torch.equal(cut, own[:, :-1])
    with pytest.raises(DeliberateError, match="or a batch or padding, otherwise"):
        model.see(**shown("qwen2_vl", rows=2))


def _pixels(given: dict) -> dict:
    return {name: one for name, one in given.items() if name not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", ["gemma3"])
def test_images_are_refused_where_masks_are_not_ours_and_text_runs(name):
    whole = seeing(name)
    model = AdaptiveModel(whole, [1, 2])
    with pytest.raises(DeliberateError, match="an attention mask of its own"):
        model.generate(**shown(name), **ADAPTIVE)
    ids = torch.arange(3, 12).unsqueeze(0)
    plain = whole.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), fidelity="exact", **ADAPTIVE)
    assert torch.equal(made, plain)


def test_what_does_not_belong_to_images_is_refused_by_name():
    text = AdaptiveModel(tiny_model("llama"), [1, 2])
    given = shown("llava")
    with pytest.raises(DeliberateError, match="pixel_values is given and LlamaForCausalLM reads"):
        text.generate(**given, **ADAPTIVE)
    model = AdaptiveModel(seeing("llava"), [1, 2])
    with pytest.raises(DeliberateError, match="reasoning or votes with images"):
        model.generate(**given, **ADAPTIVE, votes=2)
    with pytest.raises(DeliberateError, match="see: position_ids is no input of images"):
        model.see(**given, position_ids=given["input_ids"])
    with pytest.raises(DeliberateError, match="see: no pixels are given"):
        model.see(given["input_ids"])
    given["input_ids"] = given["input_ids"][:, :10]
    with pytest.raises(DeliberateError, match="LlavaForConditionalGeneration cannot read"):
        model.generate(**{**given, "attention_mask": given["attention_mask"][:, :10]}, **ADAPTIVE)


def test_a_request_with_an_image_refuses_processors_that_look_up_the_prompts_ids():
    from transformers import RepetitionPenaltyLogitsProcessor

    from deliberate.engine.sampler import TokenChooser

    model = AdaptiveModel(seeing("llava"), [1, 2])
    ids = model.see(**shown("llava"))[0]
    chooser = TokenChooser((RepetitionPenaltyLogitsProcessor(1.5),))
    with pytest.raises(DeliberateError, match=r"RepetitionPenalty.* for a prompt with images"):
        model.engine().add(Request(ids, 4, sampling=chooser))
    with pytest.raises(DeliberateError, match="token id 5000 has no embedding"):
        model.engine().add(Request([*ids.tolist(), 5000], 4))


def test_exit_states_of_training_are_of_text_and_image():
    model, given = AdaptiveModel(seeing("llava"), [1, 2]), shown("llava")
    states = model(**given, output_exit_states=True)
    logits = model.backbone.logits(states.last)
    assert torch.allclose(logits, model.base.seeing(**given).logits)
    assert torch.allclose(logits, model(**given).logits)


def test_a_saved_model_sees_again_and_an_unloaded_one_is_as_it_was(tmp_path):
    whole = seeing("llava", torch.float32)
    given = shown("llava", dtype=torch.float32)
    model = AdaptiveModel(whole, [1, 3])
    made = model.generate(**given, **ADAPTIVE)
    model.save_pretrained(tmp_path, merge=True)
    again = AdaptiveModel.from_pretrained(tmp_path)
    assert again.exit_config.layers == (1, 3)
    assert torch.equal(again.generate(**given, **ADAPTIVE), made)
    assert model.unload() is whole
    assert not any(one._forward_pre_hooks for one in whole.modules())


def test_an_image_that_was_dropped_is_an_error_and_never_another_image():
    rows = SeenRows(10, most=4)
    embed = torch.nn.Embedding(10, 2)
    first = rows.add("a", torch.ones(3, 2))
    assert rows.add("a", torch.ones(3, 2)) == first == 10
    second = rows.add("b", torch.full((3, 2), 2.0))  # there is room for one
    found = rows.look_up(torch.tensor([[1, second + 1, second + 2]]), embed)
    assert torch.equal(found[0, 0], embed.weight[1]) and bool((found[0, 1:] == 2).all())
    assert rows.knows(second) and not rows.knows(first) and not rows.knows(second + 3)
    with pytest.raises(
        DeliberateError, match=f"token id {first} is neither a token's nor that of an image"
    ):
        rows.look_up(torch.tensor([first]), embed)
    with pytest.raises(DeliberateError, match="an image of 5 positions: at most 4"):
        rows.add("c", torch.ones(5, 2))


def test_images_of_a_request_that_waits_outlast_newer_ones():
    model = AdaptiveModel(seeing("llava"), [1, 2])
    model.base.seen.most = 16  # one image
    given = shown("llava")
    alone = model.generate(**given, max_new_tokens=6, do_sample=False, fidelity="dense")
    engine = model.engine(max_running=1)
    ids = model.see(**given)[0].tolist()
    engine.add(Request(ids, 6, spec=DecodingSpec(fidelity="exact"), end_tokens=()))
    for seed in (4, 5):  # pushed out, but for the request that holds it
        model.see(**shown("llava", seed))
    assert model.base.seen.knows(ids[2])
    tokens = []
    while engine.unfinished:
        for output in engine.step():
            tokens += output.tokens
    assert tokens == alone[0, len(ids) :].tolist()
    del engine
    model.see(**shown("llava", 6))
    assert not model.base.seen.knows(ids[2])
    with pytest.raises(DeliberateError, match="has no embedding"):
        model.engine().add(Request(ids, 6))
