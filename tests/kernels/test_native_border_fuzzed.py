"""The border before the C++ kernels, fuzzed: whatever is handed over is run or refused.

`.ci/run` runs this file again under AddressSanitizer, where a read past an end is an error.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from native_calls import (
    TABLES,
    VOCAB,
    WIDTH,
    a_decode,
    a_pooled_decode,
    a_pooled_run,
    a_run,
    buffers,
    layer,
    pools,
    runs,
    weight,
)
from torch import Tensor

from deliberate.kernels import native, native_build
from deliberate.kernels.blocks import BlockFormat
from deliberate.kernels.border import BorderError
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
NUMBERS = (-(1 << 62), -2, -1, 0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 17, 64, 1 << 40)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int8)


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


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_handed_over_is_run_or_refused(seed):
    source = random.Random(seed)
    torch.manual_seed(seed)
    storages = ("float32", "float32", *BlockFormat.__members__)
    refused = done = 0
    for _ in range(250):
        what = source.choice(("run", "decode", "layer", "head"))
        try:
            built = [layer(source.choice(storages)) for _ in range(2)]
            if what == "layer":
                built[1] = other(source, built[1])
            layers = native.Layers(built)
            if what == "head":
                head = other(source, Head(None, 0.0, weight(VOCAB, WIDTH)))
                head.read(other_tensor(source, torch.zeros(3, WIDTH)), 1)
            else:
                if source.random() < 0.5:
                    layers = native.Layers([built[0], layer(source.choice(storages), window=3)])
                    call = a_pooled_decode() if what == "decode" else a_pooled_run()
                else:
                    call = a_decode() if what == "decode" else a_run()
                for name in source.sample(sorted(call), source.choice((0, 1, 1, 2))):
                    call[name] = other(source, call[name])
                (layers.decode if what == "decode" else layers.run)(**call)
            done += 1
        except (BorderError, ValueError, IndexError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert done > 40 and refused > 40
