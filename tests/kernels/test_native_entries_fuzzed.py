"""Drafted, sampled and shared passes of the C++ kernels, fuzzed: what is handed over is run or
refused. `.ci/run` runs this file again under sanitizers."""

from __future__ import annotations

import random

import pytest
import torch
from native_calls import DIM, VOCAB, WIDTH, buffers, layer, runs, weight
from native_other import other, packs

from deliberate.kernels import native_build
from deliberate.kernels.blocks import BlockFormat
from deliberate.kernels.border import BorderError
from deliberate.kernels.draft_rules import CLASSES, ChainRule, LookupRule
from deliberate.kernels.native import Layers
from deliberate.kernels.native_draft_layer import DraftLayerCall
from deliberate.kernels.native_drafted import DraftedDecoding, LayerPart, ModelPart
from deliberate.kernels.native_drafts import DraftRow
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues
from deliberate.kernels.native_pools import PooledKeysValues
from deliberate.kernels.native_sampling import SampledRow, ScoreRules, sample_rows

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
ROOM, POSITIONS, WINDOW = 8, 24, 5
RULE = ChainRule((0.5,) * CLASSES, 0.0, -1.0, 0.0, -1.0, 3)
RULES = ScoreRules(
    runs=((2,), (3, 4), (5, 6, 7)), moves=((-1, (8, 9)), (10, (11,))), tag=(12, 13), summed=True
)


def head() -> Head:
    return Head(torch.randn(WIDTH), 1e-6, weight(VOCAB, WIDTH))


def rotary() -> tuple:
    return torch.randn(POSITIONS, DIM), torch.randn(POSITIONS, DIM)


def held(source: random.Random, batch: int):
    """Keys and values of floats or in 8 bits: in rows, or in pools with these rows' slots."""
    eight = source.random() < 0.5
    if source.random() < 0.5:
        made = packs(batch, POSITIONS) if eight else buffers(batch, POSITIONS)
        return KeysValues(made), [None] * batch
    shape = (2, batch * POSITIONS, DIM + 4 if eight else DIM)
    pair = [torch.zeros(shape, dtype=torch.uint8 if eight else torch.float32) for _ in range(4)]
    kv = PooledKeysValues([tuple(pair[:2]), tuple(pair[2:])], [0, 0], [WINDOW, WINDOW])
    # Slots from the last on, in two runs a sequence.
    half = POSITIONS // 2
    return kv, [
        runs(((0, row * POSITIONS + half, half), (half, row * POSITIONS, half)))
        for row in range(batch)
    ]


def drafted(source: random.Random) -> dict:
    kv, where = held(source, 1)
    text = [source.randrange(VOCAB) for _ in range(source.randint(3, 12))]
    made = {
        "kv": kv,
        "embedding": torch.randn(VOCAB, WIDTH),
        "text": text,
        "rotary": rotary(),
        "head": head(),
        **{"room": ROOM, "left": source.randint(1, 9), "threads": 1, "runs": where[0]},
        **{"passes": source.randint(1, 4), "stops": (1,), "layer": None, "model": None},
        "lookup": LookupRule((1, 2, 3), 1, 3, 2) if source.random() < 0.6 else None,
    }
    kind = source.choice(("layer", "model", "none"))
    if kind == "layer":
        call = DraftLayerCall(
            Layers([layer(window=0, query_norm=None, key_norm=None)]),
            *(weight(VOCAB, WIDTH), weight(WIDTH, 2 * WIDTH)),
            *((torch.randn(WIDTH), 1e-6), (torch.randn(WIDTH), 1e-6)),
        )
        states = torch.randn(source.randint(1, len(text) - 1), WIDTH)
        place = KeysValues(buffers(1, 2 * POSITIONS, layers=1))
        rows = tuple(torch.randn(2 * POSITIONS, DIM) for _ in range(4))
        made["layer"] = LayerPart(call, place, head(), rows, 0, source.randint(0, 9), states, RULE)
    elif kind == "model":
        ranges = source.choice((((0, 2),), ((0, 1), (1, 2)), ((1, 2),)))
        storage = source.choice(("float32", *BlockFormat.__members__))
        made["model"] = ModelPart(Layers([layer(storage), layer()]), ranges, head(), RULE)
    return made


def sampled(source: random.Random) -> dict:
    kv, where = held(source, 3)
    rows = [
        SampledRow(
            0 if own else row,
            *(source.randrange(VOCAB), source.randint(0, 9), source.randint(1, 6)),
            RULES if source.random() < 0.7 else ScoreRules(),
            until=(1,),
            recent=tuple(source.randrange(VOCAB) for _ in range(source.randint(0, 4))),
            noise=torch.randn(6, VOCAB + source.choice((0, 3))) if source.random() < 0.6 else None,
            left_out=source.random() < 0.2,
            runs=own,
        )
        for row, own in enumerate(where)
    ]
    made = {"kv": kv, "embedding": torch.randn(VOCAB, WIDTH), "rows": rows}
    return made | {"rotary": rotary(), "head": head(), "threads": 1, "last": 2}


def shared(source: random.Random) -> dict:
    kv, where = held(source, 3)
    rows = [
        DraftRow(
            0 if own else row,
            *(source.randrange(VOCAB), source.randint(0, 9)),
            steps=5,
            requested=source.randint(0, 5),
            threshold=source.choice((0.0, 0.1)),
            stops=(1,),
            runs=own,
        )
        for row, own in enumerate(where)
    ]
    made = {"kv": kv, "embedding": torch.randn(VOCAB, WIDTH), "rows": rows, "last": 2}
    made |= {"rotary": rotary(), "head": head(), "threads": 1, "statistic": 0}
    return made | {"enough": 2, "patience": 2, "waiting": source.random() < 0.2}


@pytest.mark.parametrize("entry", [drafted, sampled, shared], ids=lambda one: one.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_handed_over_is_run_or_refused(entry, seed):
    source = random.Random(seed)
    torch.manual_seed(seed)
    refused = done = 0
    for _ in range(150):
        layers = Layers([layer(), layer()])
        call = entry(source)
        try:
            for name in source.sample(sorted(call), source.choice((0, 1, 1, 2))):
                call[name] = other(source, call[name])
            if entry is drafted:
                DraftedDecoding(layers).decode(**call)
            elif entry is sampled:
                sample_rows(layers, **call)
            else:
                layers.draft_rows(**call)
            done += 1
        except (BorderError, ValueError, IndexError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert done > 20 and refused > 20
