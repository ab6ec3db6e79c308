"""Other values in the place of arguments of the C++ kernels: some run, the rest is refused."""

from __future__ import annotations

import dataclasses
import random

import torch
from native_calls import DIM, KV, TABLES, VOCAB, WIDTH, buffers, pools, runs, weight
from torch import Tensor

from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns

NUMBERS = (-(1 << 62), -2, -1, 0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 17, 64, 1 << 40)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int8)


def packs(batch: int, capacity: int, layers: int = 2, extra: int = 0):
    """Keys and values in 8 bits, with their scales: in rows, or (batch 0) pools."""
    shape = ((batch,) if batch else ()) + (KV, capacity, DIM + 4 + extra)
    return [
        (torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8))
        for _ in range(layers)
    ]


def other_tensor(source: random.Random, like: Tensor) -> Tensor:
    """A tensor that is somewhat like another: other sizes, dtype, strides."""
    shape = [max(0, size + source.choice((-1, 0, 0, 0, 1, 2))) for size in like.shape]
    if source.random() < 0.1:
        shape = shape[1:]
    made = torch.randn(shape).to(source.choice(DTYPES))
    kind = source.random()
    if kind < 0.1:
        return made.repeat_interleave(2, -1)[..., ::2] if made.dim() else made
    if kind < 0.2 and made.dim() > 1:
        return made.transpose(0, 1).contiguous().transpose(0, 1)
    if kind < 0.25:
        return made.to("meta")
    return made


def other(source: random.Random, value):
    """Something in the place of an argument."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return source.choice(NUMBERS)
    if isinstance(value, float):
        return source.choice((0.0, 1.0, float("nan"), float("inf"), -1.0))
    if isinstance(value, Tensor):
        return other_tensor(source, value)
    if isinstance(value, tuple):
        return tuple(other(source, one) if source.random() < 0.6 else one for one in value)
    if isinstance(value, list):
        return [other(source, one) if source.random() < 0.6 else one for one in value]
    if isinstance(value, PooledKeysValues):
        kind = source.random()
        if kind < 0.1:
            return PooledKeysValues(packs(0, source.choice((4, 11, 12))), [0, 1], [5, 3])
        if kind < 0.2:
            return PooledKeysValues(
                [(other_tensor(source, keys), values) for keys, values in pools()], [0, 1], [5, 3]
            )
        groups = source.choice(([0, 1], [1, 0], [0, 0], [1, 1]))
        windows = source.choice(([5, 3], [3, 5], [5, 5]))
        return PooledKeysValues(pools(source.choice((1, 4, 11, 12, 13))), groups, windows)
    if isinstance(value, SequenceRuns):
        tables = [
            [tuple(other(source, part) if source.random() < 0.1 else part for part in one)
             for one in group]
            for group in source.choice((TABLES, TABLES[:1], (TABLES[0], TABLES[0]), TABLES[::-1]))
        ]  # fmt: skip
        return runs(*tables)
    if isinstance(value, KeysValues) and source.random() < 0.3:
        return KeysValues(
            packs(2, source.choice((1, 8, 9, 16, 40)), extra=source.choice((0, 0, 1)))
        )
    if isinstance(value, KeysValues):
        return KeysValues(
            [
                (other_tensor(source, keys), keys if source.random() < 0.2 else values)
                for keys, values in buffers(source.choice((1, 2)), source.choice((1, 8, 9, 16)))
            ]
            if source.random() < 0.3
            else buffers(source.choice((1, 2)), source.choice((1, 2, 8, 9, 16)), layers=2)
        )
    if isinstance(value, Head):
        n, k = other_tensor(source, torch.zeros(VOCAB, WIDTH)).shape[-2:] or (1, 1)
        return Head(torch.randn(k), 1e-6, weight(n, k))
    if dataclasses.is_dataclass(value):
        name = source.choice([field.name for field in dataclasses.fields(value)])
        return dataclasses.replace(value, **{name: other(source, getattr(value, name))})
    return value
