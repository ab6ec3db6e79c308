"""Calls that the C++ kernels can run, from which a test makes those that they cannot."""

from __future__ import annotations

import torch

from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues, LayerTensors, Span, Weight
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns, SlotRun

WIDTH, HEADS, KV, DIM, FEED, VOCAB = 12, 4, 2, 6, 10, 17
BATCH, CAPACITY, POSITIONS = 2, 9, 11


def block_part(n: int, k: int, name: str, rotary: int = 0) -> BlockPart:
    """Rows of blocks with any bytes, and so any scales, infinite ones and NaN too."""
    chosen = BlockFormat[name]
    data = torch.randint(0, 256, (n, chosen.row_bytes(k)), dtype=torch.uint8)
    return BlockPart(data, chosen, rotary)


def weight(n: int, k: int, storage: str = "float32", *, bias: bool = False) -> Weight | BlockWeight:
    if storage in BlockFormat.__members__:
        # Of a QKV matrix the queries are a part of their own.
        cut = HEADS * DIM if n > HEADS * DIM else n
        sizes = (cut, n - cut) if n > cut else (n,)
        parts = tuple(block_part(size, k, storage) for size in sizes)
        return BlockWeight(parts, k, torch.randn(n) if bias else None)
    values = 0.3 * torch.randn(n, k)
    extra = torch.randn(n) if bias else None
    return Weight(values.to(getattr(torch, storage)), extra)


def layer(storage: str = "float32", **changes) -> LayerTensors:
    made = {
        "qkv": weight((HEADS + 2 * KV) * DIM, WIDTH, storage, bias=True),
        "out": weight(WIDTH, HEADS * DIM, storage),
        "gate_up": weight(2 * FEED, WIDTH, storage),
        "down": weight(WIDTH, FEED, storage),
        "attention_norm": torch.randn(WIDTH),
        "query_norm": torch.randn(DIM),
        "key_norm": torch.randn(DIM),
        "mlp_norm": torch.randn(WIDTH),
        **{"heads": HEADS, "kv_heads": KV, "head_dim": DIM, "window": 5},
        **{"scaling": 0.4, "eps": 1e-6, "head_eps": 1e-6},
    }
    return LayerTensors(**(made | changes))


def buffers(batch: int = BATCH, capacity: int = CAPACITY, dim: int = DIM, layers: int = 2):
    return [
        (torch.zeros(batch, KV, capacity, dim), torch.zeros(batch, KV, capacity, dim))
        for _ in range(layers)
    ]


def a_run() -> dict:
    """A pass of two rows, of three tokens and of two, that the kernels can run."""
    return {
        "first": 0,
        "last": 2,
        "kv": KeysValues(buffers()),
        "hidden": torch.randn(2, 3, WIDTH),
        "rotary": (torch.randn(2, 3, DIM), torch.randn(2, 3, DIM)),
        "spans": [Span(0, 4, 3), Span(1, 0, 2, torch.zeros(2, dtype=torch.bool))],
        "apart": 3,
        "threads": 1,
    }


def pools(slots: int = 12, dim: int = DIM, layers: int = 2):
    return [(torch.zeros(KV, slots, dim), torch.zeros(KV, slots, dim)) for _ in range(layers)]


def runs(*groups: tuple) -> SequenceRuns:
    return SequenceRuns([[SlotRun(*one) for one in group] for group in groups])


# Windows of 5 and of 3 tokens: slots of 9 positions, and of positions 2 to 8 only.
TABLES = (((0, 8, 4), (4, 0, 4), (8, 4, 1)), ((2, 5, 7),))


def a_pooled_run() -> dict:
    """The same over pools of two groups of layers, for layers with windows of 5 and 3 tokens."""
    spans = [Span(0, 4, 3, None, runs(*TABLES)), Span(0, 0, 2, None, runs(TABLES[0], TABLES[0]))]
    return a_run() | {"kv": PooledKeysValues(pools(), [0, 1], [5, 3]), "spans": spans}


def a_decode() -> dict:
    return {
        "last": 2,
        "kv": KeysValues(buffers(1)),
        "embedding": torch.randn(VOCAB, WIDTH),
        "token": 3,
        "start": 2,
        "rotary": (torch.randn(POSITIONS, DIM), torch.randn(POSITIONS, DIM)),
        "head": Head(torch.randn(WIDTH), 1e-6, weight(VOCAB, WIDTH)),
        "steps": 4,
        "requested": 3,
        "statistic": 0,
        "threshold": 0.1,
        "stops": (5,),
        "accept_stops": False,
        "threads": 1,
    }


def a_pooled_decode() -> dict:
    kv = PooledKeysValues(pools(), [0, 1], [5, 3])
    return a_decode() | {"kv": kv, "start": 4, "runs": runs(*TABLES)}


def spans(*made: tuple) -> dict:
    return {"spans": [Span(*one) for one in made]}
