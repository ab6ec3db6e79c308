"""One launch writes the keys and values of every skipped layer, as the layers would have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels.ops.kv_fill import fold_kv_weights, kv_fill
from deliberate.utils.errors import DeliberateError

EPS = 1e-6
CAPACITY = 9


@dataclass
class Layers:
    """Random projections of n layers as a model has them, and the rotary tables."""

    keys: list[Tensor]
    values: list[Tensor]
    gains: list[Tensor]
    bias: Tensor
    key_gain: Tensor
    cos: Tensor
    sin: Tensor


def layers(draw: cases.Draw, n: int, kv: int, hd: int, width: int) -> Layers:
    angle = torch.rand(CAPACITY + 2, hd // 2, generator=draw.generator) * 6.0
    angle = torch.cat((angle, angle), dim=1)
    return Layers(
        keys=[draw.normal(kv * hd, width, scale=width**-0.5) for _ in range(n)],
        values=[draw.normal(kv * hd, width, scale=width**-0.5) for _ in range(n)],
        gains=[draw.gain(width) for _ in range(n)],
        bias=draw.normal(n, 2, kv, hd),
        key_gain=torch.stack([draw.gain(hd) for _ in range(n)]),
        cos=angle.cos().to(draw.dtype).to(cases.DEVICE),
        sin=angle.sin().to(draw.dtype).to(cases.DEVICE),
    )


def exact(
    of: Layers, hidden: Tensor, layer: int, position: int, *, bias: bool, key_norm: bool
) -> tuple[Tensor, Tensor]:
    """Key and value ``[kv, hd]`` of one token in one layer, float64, as transformers computes."""
    kv, hd = of.bias.shape[2:]
    x = hidden.double()
    x = x / (x.square().mean() + EPS).sqrt() * of.gains[layer].double()
    key = (of.keys[layer].double() @ x).view(kv, hd)
    value = (of.values[layer].double() @ x).view(kv, hd)
    if bias:
        key, value = key + of.bias[layer, 0].double(), value + of.bias[layer, 1].double()
    if key_norm:
        key = key / (key.square().mean(dim=1, keepdim=True) + EPS).sqrt()
        key = key * of.key_gain[layer].double()
    turned = torch.cat((-key[:, hd // 2 :], key[:, : hd // 2]), dim=1)
    key = key * of.cos[position].double() + turned * of.sin[position].double()
    return key, value


def caches(n: int, rows: int, kv: int, hd: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Poisoned views of a cache of more layers."""
    made = [
        torch.full((n + 2, rows, kv, CAPACITY, hd), math.nan, dtype=dtype, device=cases.DEVICE)
        for _ in range(2)
    ]
    return made[0][2:], made[1][2:]


@cases.backends
@cases.dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("key_norm", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 2, 10, 123), (5, 2, 1, 6, 123)], ids=str)
def test_fills_every_layer_at_each_rows_position(
    backend: str,
    dtype: torch.dtype,
    bias: bool,
    key_norm: bool,
    shape: tuple[int, int, int, int, int],
) -> None:
    rows, n, kv, hd, width = shape
    draw = cases.Draw(rows, dtype)
    of = layers(draw, n, kv, hd, width)
    hidden = draw.normal(rows, width, scale=2.0)
    positions = torch.tensor([3, 0, 8, 3, 5][:rows], device=cases.DEVICE)
    key_cache, value_cache = caches(n, rows, kv, hd, dtype)
    expected = [torch.full_like(key_cache, math.nan, dtype=torch.float64) for _ in range(2)]
    for row in range(rows):
        at = int(positions[row])
        for layer in range(n):
            made = exact(of, hidden[row], layer, at, bias=bias, key_norm=key_norm)
            for cache, part in zip(expected, made, strict=True):
                cache[layer, row, :, at] = part
    with cases.running(backend):
        weight = fold_kv_weights(of.keys, of.values, of.gains, hd)
        kv_fill(
            hidden, weight, of.bias if bias else None, of.key_gain if key_norm else None,
            of.cos, of.sin, positions, key_cache, value_cache, EPS, EPS,
        )  # fmt: skip
    # Everything but the one slot of each row is still poison: closeness compares the NaNs too.
    cases.assert_close("keys", expected[0], key_cache, cases.RATIO[dtype])
    cases.assert_close("values", expected[1], value_cache, cases.RATIO[dtype])


@cases.backends
@cases.active
def test_only_active_rows_are_filled(backend: str, active: str) -> None:
    draw = cases.Draw(1)
    rows, count, chosen = cases.listed(active)
    of = layers(draw, 2, 2, 8, 30)
    hidden = draw.normal(5, 30)
    positions = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32, device=cases.DEVICE)
    key_cache, value_cache = caches(2, 5, 2, 8, torch.float32)
    with cases.running(backend):
        weight = fold_kv_weights(of.keys, of.values, of.gains, 8)
        kv_fill(
            hidden, weight, None, None, of.cos, of.sin, positions, key_cache, value_cache,
            EPS, EPS, rows, count,
        )  # fmt: skip
    written = {tuple(place) for place in (~value_cache.isnan())[0, :, 0, :, 0].nonzero().tolist()}
    assert written == {(row, row + 1) for row in chosen}
    for row in chosen:
        key, value = exact(of, hidden[row], 1, row + 1, bias=False, key_norm=False)
        cases.assert_close("key", key, key_cache[1, row, :, row + 1], 2e-6)
        cases.assert_close("value", value, value_cache[1, row, :, row + 1], 2e-6)


@cases.backends
def test_a_position_outside_the_cache_writes_nothing(backend: str) -> None:
    draw = cases.Draw(2)
    of = layers(draw, 1, 1, 8, 30)
    positions = torch.tensor([CAPACITY, -1, 4], device=cases.DEVICE)
    key_cache, value_cache = caches(1, 3, 1, 8, torch.float32)
    with cases.running(backend):
        weight = fold_kv_weights(of.keys, of.values, of.gains, 8)
        kv_fill(
            draw.normal(3, 30), weight, None, None, of.cos, of.sin, positions,
            key_cache, value_cache, EPS, EPS,
        )  # fmt: skip
    for cache in (key_cache, value_cache):
        assert (~cache.isnan())[0, :, 0, :, 0].nonzero().tolist() == [[2, 4]]


@cases.backends
def test_a_row_that_is_not_finite_harms_no_other(backend: str) -> None:
    draw = cases.Draw(3)
    of = layers(draw, 1, 1, 8, 30)
    hidden = draw.normal(2, 30)
    hidden[0, 3] = math.inf
    key_cache, value_cache = caches(1, 2, 1, 8, torch.float32)
    positions = torch.zeros(2, dtype=torch.int64, device=cases.DEVICE)
    with cases.running(backend):
        weight = fold_kv_weights(of.keys, of.values, of.gains, 8)
        kv_fill(
            hidden, weight, None, None, of.cos, of.sin, positions, key_cache, value_cache,
            EPS, EPS,
        )  # fmt: skip
    assert bool(value_cache[0, 0, 0, 0].isnan().any())
    assert bool(value_cache[0, 1, 0, 0].isfinite().all())


def test_shapes_that_do_not_fit_are_one_line_errors() -> None:
    weight = torch.zeros(1, 2, 1, 8, 30)
    cache = torch.zeros(1, 2, 1, CAPACITY, 8)
    table = torch.zeros(4, 8)
    at = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DeliberateError, match="hidden"):
        kv_fill(
            torch.zeros(2, 31), weight, None, None, table, table, at, cache, cache.clone(), EPS, EPS
        )
    with pytest.raises(DeliberateError, match="value_cache"):
        kv_fill(
            torch.zeros(2, 30), weight, None, None, table, table, at, cache, cache[:, :1], EPS, EPS
        )
    with pytest.raises(DeliberateError, match="per layer"):
        fold_kv_weights([table], [], [table[0]], 4)


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(4)
    of = layers(draw, 2, 1, 8, 30)
    hidden = draw.normal(2, 30)
    positions = torch.tensor([1, 2], device=cases.DEVICE)
    weight = fold_kv_weights(of.keys, of.values, of.gains, 8)

    def step(x: Tensor) -> Tensor:
        keys = torch.zeros(2, 2, 1, CAPACITY, 8, device=cases.DEVICE)
        values = torch.zeros_like(keys)
        kv_fill(x, weight, None, None, of.cos, of.sin, positions, keys, values, EPS, EPS)
        return keys + values

    with cases.running(backend):
        cache = torch.zeros(2, 2, 1, CAPACITY, 8, device=cases.DEVICE)
        torch.library.opcheck(
            kv_fill,
            (
                hidden, weight, None, None, of.cos, of.sin, positions, cache, cache.clone(),
                EPS, EPS,
            ),
        )  # fmt: skip
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden), step(hidden))
