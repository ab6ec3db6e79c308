"""The border before the C++ kernels: nothing that they cannot read gets past it.

`.ci/run` runs this file again under AddressSanitizer, where a read past an end is an error.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from native_calls import (
    CAPACITY,
    DIM,
    FEED,
    HEADS,
    KV,
    TABLES,
    VOCAB,
    WIDTH,
    a_decode,
    a_pooled_decode,
    a_pooled_run,
    a_run,
    block_part,
    buffers,
    layer,
    pools,
    runs,
    spans,
    weight,
)

from deliberate.kernels import native, native_build
from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight
from deliberate.kernels.border import BorderError
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues, Span, Weight
from deliberate.kernels.native_pools import PooledKeysValues

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


def test_what_is_right_is_run():
    layers = native.Layers([layer(), layer()])
    call = a_run()
    before = call["hidden"].clone()
    layers.run(**call)
    assert not torch.equal(call["hidden"], before)
    assert len(layers.decode(**a_decode()).states) >= 1
    pooled = native.Layers([layer(), layer(window=3)])
    pooled.run(**a_pooled_run())
    assert len(pooled.decode(**a_pooled_decode()).states) >= 1
    head = Head(torch.randn(WIDTH), 1e-6, weight(VOCAB, WIDTH, bias=True))
    assert head.read(torch.randn(3, WIDTH), 1).logits.shape == (3, VOCAB)
    assert head.read(torch.randn(0, WIDTH), 1).tokens == []


def test_packed_tokens_are_what_they_are_apart():
    layers, call = native.Layers([layer(), layer()]), a_run()
    real = torch.tensor([0, 1, 2, 3, 4])  # the last of the second row is padding
    packed = call | {
        "apart": 0,
        "kv": KeysValues(buffers()),
        "hidden": call["hidden"].flatten(0, 1)[real].clone(),
        "rotary": tuple(part.flatten(0, 1)[real].clone() for part in call["rotary"]),
    }
    layers.run(**call)
    layers.run(**packed)
    assert torch.equal(packed["hidden"], call["hidden"].flatten(0, 1)[real])


HOLES = torch.zeros(2, dtype=torch.bool)
WRONG_RUNS = {
    "bfloat16 states": {"hidden": torch.randn(2, 3, WIDTH).bfloat16()},
    "double states": {"hidden": torch.randn(2, 3, WIDTH).double()},
    "strided states": {"hidden": torch.randn(2, 3, 2 * WIDTH)[..., ::2]},
    "narrow states": {"hidden": torch.randn(2, 3, WIDTH - 1)},
    "states elsewhere": {"hidden": torch.randn(2, 3, WIDTH, device="meta")},
    "sparse states": {"hidden": torch.randn(6, WIDTH).to_sparse()},
    "few states": {"hidden": torch.randn(1, 3, WIDTH)},
    "few cosines": {"rotary": (torch.randn(2, 2, DIM), torch.randn(2, 3, DIM))},
    "few sines": {"rotary": (torch.randn(2, 3, DIM), torch.randn(3, DIM))},
    "narrow cosines": {"rotary": (torch.randn(2, 3, DIM - 2), torch.randn(2, 3, DIM))},
    "half sines": {"rotary": (torch.randn(2, 3, DIM), torch.randn(2, 3, DIM).half())},
    "a layer too many": {"last": 3},
    "layers backwards": {"first": 2, "last": 1},
    "a layer before the first": {"first": -1},
    "no threads": {"threads": 0},
    "a row that is not there": spans((2, 0, 1)),
    "a row before the first": spans((-1, 0, 1)),
    "a token before the first": spans((0, -1, 2)),
    "more tokens than the cache holds": spans((0, CAPACITY - 2, 3)),
    "more tokens than the pass has": spans((0, 0, 3), (1, 0, 3), (1, 0, 1)),
    "more tokens than are apart": spans((0, 0, 4)),
    "packed, more tokens than the pass has": spans((0, 0, 3), (1, 0, 4)) | {"apart": 0},
    "fewer than no tokens": spans((0, 3, -1)),
    "too few holes": spans((0, 4, 3, HOLES)),
    "holes that are numbers": spans((0, 0, 2, HOLES.float())),
    "holes with gaps": spans((0, 0, 2, torch.zeros(4, dtype=torch.bool)[::2])),
    "a cache of another model": {"kv": KeysValues(buffers(dim=DIM + 2))},
    "a cache of fewer layers": {"kv": KeysValues(buffers(layers=1))},
}
SECOND = Span(0, 0, 2, None, runs(TABLES[0], TABLES[0]))
WRONG_POOLED_RUNS = {
    "no tables": {"spans": [Span(0, 4, 3), SECOND]},
    "tables of too few groups": {"spans": [Span(0, 4, 3, None, runs(TABLES[0])), SECOND]},
    "a row": {"spans": [Span(1, 4, 3, None, runs(*TABLES)), SECOND]},
    "more tokens than have slots": {"spans": [Span(0, 7, 3, None, runs(*TABLES)), SECOND]},
    "a window without slots": {"spans": [Span(0, 3, 3, None, runs(*TABLES)), SECOND]},
    "a group without slots": {"spans": [Span(0, 4, 3, None, runs(TABLES[0], ())), SECOND]},
    "a slot behind the pool": {
        "spans": [Span(0, 4, 3, None, runs(((0, 4, 9),), TABLES[0])), SECOND]
    },
    "a slot behind a shorter pool": {"kv": PooledKeysValues(pools(11), [0, 1], [5, 3])},
    "other windows": {"kv": PooledKeysValues(pools(), [0, 1], [5, 4])},
    "another model's pools": {"kv": PooledKeysValues(pools(dim=DIM + 2), [0, 1], [5, 3])},
    "pools of fewer layers": {"kv": PooledKeysValues(pools(layers=1), [0], [5])},
    "buffers of rows": {"kv": KeysValues(buffers())},
}
WRONG_DECODES = {
    "a bfloat16 embedding": {"embedding": torch.randn(VOCAB, WIDTH).bfloat16()},
    "an embedding that is narrow": {"embedding": torch.randn(VOCAB, WIDTH - 1)},
    "a head with more rows than the embedding": {"embedding": torch.randn(VOCAB - 1, WIDTH)},
    "a token that is not there": {"token": VOCAB},
    "a token before the first": {"token": -1},
    "more steps than the cache holds": {"steps": CAPACITY - 1},
    "more steps than there are positions": {"rotary": (torch.randn(5, DIM), torch.randn(5, DIM))},
    "no steps": {"steps": 0, "requested": 0},
    "a start before the first": {"start": -1},
    "more requested than run": {"requested": 5},
    "fewer requested than none": {"requested": -1},
    "another statistic": {"statistic": 3},
    "no layers": {"last": 0},
    "a layer too many": {"last": 3},
    "a head of another width": {"head": Head(None, 0.0, weight(VOCAB, WIDTH + 1))},
}
WRONG_LAYERS = {
    "half weights": {"out": weight(WIDTH, HEADS * DIM, "float16")},
    "weights with gaps": {"down": Weight(torch.randn(WIDTH, 2 * FEED)[:, ::2])},
    "int8 that is in no panels": {"down": Weight(torch.zeros(WIDTH, FEED, dtype=torch.int8))},
    "bfloat16 that is in no panels": {"down": Weight(torch.randn(WIDTH, FEED).bfloat16())},
    "a short bias": {"out": Weight(torch.randn(WIDTH, 24), torch.randn(3))},
    "few query rows": {"qkv": weight((HEADS + KV) * DIM, WIDTH)},
    "a narrow output": {"out": weight(WIDTH, HEADS * DIM - 1)},
    "an uneven gate": {"gate_up": weight(2 * FEED - 1, WIDTH)},
    "a short norm": {"mlp_norm": torch.randn(WIDTH - 1)},
    "a double norm": {"attention_norm": torch.randn(WIDTH).double()},
    "a long head norm": {"query_norm": torch.randn(DIM + 1)},
    "heads that cannot be shared": {"kv_heads": 3},
    "no heads": {"heads": 0},
    "an odd dimension": {"head_dim": 5},
    "a window before the first": {"window": -1},
    "a vector for a matrix": {"down": Weight(torch.randn(FEED))},
    "weights elsewhere": {"down": Weight(torch.randn(WIDTH, FEED, device="meta"))},
}


WRONG_BLOCKS = {
    "short rows": lambda: BlockWeight((block_part(4, 32, "Q4_1"),), 33),
    "rows of another format": lambda: BlockWeight(
        (dataclasses.replace(block_part(4, 32, "Q4_1"), format=BlockFormat.Q4_0),), 32
    ),
    "a format that is not read": lambda: BlockPart(torch.zeros(4, 22, dtype=torch.uint8), 6),
    "signed bytes": lambda: BlockWeight(
        (BlockPart(torch.zeros(4, 20, dtype=torch.int8), BlockFormat.Q4_1),), 32
    ),
    "bytes with gaps": lambda: BlockWeight(
        (BlockPart(torch.zeros(4, 40, dtype=torch.uint8)[:, ::2], BlockFormat.Q4_1),), 32
    ),
    "no parts": lambda: BlockWeight((), 32),
    "no rows": lambda: BlockWeight((block_part(0, 32, "Q8_0"),), 32),
    "heads that do not fit": lambda: BlockWeight((block_part(6, 32, "Q8_0", 4),), 32),
    "an odd head": lambda: BlockWeight((block_part(6, 32, "Q8_0", 3),), 32),
    "a short bias": lambda: BlockWeight((block_part(4, 32, "Q8_0"),), 32, torch.zeros(3)).multiply(
        torch.zeros(1, 32)
    ),
    "narrow activations": lambda: weight(4, 32, "Q8_0").multiply(torch.zeros(1, 31)),
    "double activations": lambda: weight(4, 32, "Q8_0").multiply(torch.zeros(1, 32).double()),
    "a row that is not there": lambda: weight(4, 32, "Q8_0").widen([4]),
    "a row before the first": lambda: weight(4, 32, "Q8_0").widen([-1]),
    "queries and keys in one part": lambda: native.Layers(
        [layer(qkv=BlockWeight((block_part((HEADS + 2 * KV) * DIM, WIDTH, "Q4_K"),), WIDTH))]
    ),
    "a narrow embedding": lambda: native.Layers([layer(), layer()]).decode(
        **(a_decode() | {"embedding": weight(VOCAB, WIDTH + 1, "Q8_0")})
    ),
}


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_blocks_that_cannot_be_read_are_refused_in_one_line(name):
    with pytest.raises(BorderError) as refused:
        WRONG_BLOCKS[name]()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("storage", BlockFormat.__members__)
def test_layers_heads_and_embeddings_of_blocks_are_run(storage):
    layers = native.Layers([layer(storage), layer("Q8_0")])
    layers.run(**a_run())
    layers.run(**(a_run() | {"write_only": True}))
    head = Head(torch.randn(WIDTH), 1e-6, weight(VOCAB, WIDTH, storage, bias=True))
    assert head.read(torch.randn(3, WIDTH), 1).logits.shape == (3, VOCAB)
    embedding = weight(VOCAB, WIDTH, storage)
    assert len(layers.decode(**(a_decode() | {"embedding": embedding, "head": head})).states) >= 1
    for rows in (1, 3, 6):
        for n in (1, 9, 13):
            made = weight(n, 7 * WIDTH, storage)
            assert made.multiply(torch.randn(rows, 7 * WIDTH)).shape == (rows, n)
            assert made.widen([n - 1]).shape == (1, 7 * WIDTH)


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_a_pass_that_cannot_be_read_is_refused_in_one_line(name):
    with pytest.raises(BorderError) as refused:
        native.Layers([layer(), layer()]).run(**(a_run() | WRONG_RUNS[name]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", WRONG_POOLED_RUNS)
def test_a_pass_over_blocks_that_cannot_be_read_is_refused_in_one_line(name):
    with pytest.raises(BorderError) as refused:
        native.Layers([layer(), layer(window=3)]).run(**(a_pooled_run() | WRONG_POOLED_RUNS[name]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: runs(((0, 0, 4), (5, 4, 4))),
        lambda: runs(((0, -1, 4),)),
        lambda: runs(((-1, 0, 4),)),
        lambda: runs(((0, 0, 0),)),
        lambda: runs(((0, 0, -4),)),
        lambda: PooledKeysValues(pools(), [0], [5, 3]),
        lambda: PooledKeysValues(pools(), [0, 2], [5, 3]),
        lambda: PooledKeysValues(pools(), [0, 0], [5, 3]),
        lambda: PooledKeysValues(pools(), [0, 1], [5]),
        lambda: PooledKeysValues(buffers(), [0, 1], [5, 3]),
        lambda: PooledKeysValues([(pools()[0][0], pools(11)[0][0])], [0], [5]),
        lambda: PooledKeysValues([(one.double(), one) for one, _ in pools()], [0, 1], [5, 3]),
    ],
)
def test_pools_and_runs_that_contradict_themselves_are_refused_when_made(wrong):
    with pytest.raises(BorderError):
        wrong()


@pytest.mark.parametrize(
    "wrong", [{"runs": None}, {"runs": runs(*TABLES), "row": 1}, {"start": 6}, {"start": 3}]
)
def test_steps_over_blocks_that_cannot_be_run_are_refused(wrong):
    with pytest.raises(BorderError):
        native.Layers([layer(), layer(window=3)]).decode(**(a_pooled_decode() | wrong))


@pytest.mark.parametrize("name", WRONG_DECODES)
def test_steps_that_cannot_be_run_are_refused_in_one_line(name):
    with pytest.raises(BorderError) as refused:
        native.Layers([layer(), layer()]).decode(**(a_decode() | WRONG_DECODES[name]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_layers_that_cannot_be_read_are_refused_when_they_are_built_in(name):
    with pytest.raises(BorderError):
        native.Layers([layer(), layer(**WRONG_LAYERS[name])])


@pytest.mark.parametrize(
    ("states", "arguments"),
    [
        (torch.randn(2, WIDTH).double(), {}),
        (torch.randn(2, WIDTH + 1), {}),
        (torch.randn(WIDTH), {}),
        (torch.randn(2, 2 * WIDTH)[:, ::2], {}),
        (torch.randn(2, WIDTH), {"gain": torch.randn(WIDTH - 1)}),
        (torch.randn(2, WIDTH), {"factors": [torch.randn(3, WIDTH), torch.randn(WIDTH, 4)]}),
        (torch.randn(2, WIDTH), {"factors": [torch.randn(3, WIDTH)]}),
        (torch.randn(2, WIDTH), {"factors": [torch.randn(WIDTH, WIDTH).half()]}),
    ],
)
def test_heads_and_states_that_do_not_fit_are_refused(states, arguments):
    usual = {"gain": torch.randn(WIDTH), "eps": 1e-6, "head": weight(VOCAB, WIDTH)}
    with pytest.raises(BorderError):
        Head(**(usual | arguments)).read(states, 1)
