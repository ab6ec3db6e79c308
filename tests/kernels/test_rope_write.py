"""One launch between the QKV product and attention: queries out, keys and values in their slots."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels.ops.rope_write import rope_write
from deliberate.utils.errors import DeliberateError

EPS = 1e-6
CAPACITY = 9


def tables(draw: cases.Draw, hd: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(CAPACITY + 2, hd // 2, generator=draw.generator) * 6.0
    angle = torch.cat((angle, angle), dim=1)
    return tuple(part.to(draw.dtype).to(cases.DEVICE) for part in (angle.cos(), angle.sin()))


def caches(rows: int, kv: int, hd: int, dtype: torch.dtype) -> list[Tensor]:
    """Poisoned, and as a layer's view of a longer buffer is: not contiguous."""
    made = torch.full((2, rows, kv, CAPACITY + 3, hd), math.nan, dtype=dtype, device=cases.DEVICE)
    return [buffer[:, :, :CAPACITY] for buffer in made]


def exact(x: Tensor, gain: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Heads ``[n, hd]`` of one token after norm and rotation, float64, pair by pair."""
    x = x.double()
    if gain is not None:
        x = x / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt() * gain.double()
    if cos is None or sin is None:
        return x
    half, out = x.shape[1] // 2, x.clone()
    for i in range(half):
        out[:, i] = x[:, i] * cos[i].double() - x[:, i + half] * sin[i].double()
        out[:, i + half] = (
            x[:, i + half] * cos[i + half].double() + x[:, i] * sin[i + half].double()
        )
    return out


@cases.backends
@cases.dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 1, 10), (4, 6, 3, 6)], ids=str)
def test_each_token_goes_to_the_slot_of_its_position(
    backend: str, dtype: torch.dtype, bias: bool, norms: bool, shape: tuple[int, int, int, int]
) -> None:
    rows, heads, kv, hd = shape
    draw = cases.Draw(rows, dtype)
    wide = draw.normal(rows, (heads + 2 * kv) * hd + 7)
    qkv = wide[:, : (heads + 2 * kv) * hd]  # cut out of something wider
    added = draw.normal(qkv.shape[1]) if bias else None
    gains = (draw.gain(hd), draw.gain(hd)) if norms else (None, None)
    cos, sin = tables(draw, hd)
    positions = torch.tensor([3, 0, 8, 3][:rows], device=cases.DEVICE)
    keys, values = caches(rows, kv, hd, dtype)
    query = torch.full((rows, heads, hd), math.nan, dtype=dtype, device=cases.DEVICE)
    wanted = [torch.full_like(one, math.nan, dtype=torch.float64) for one in (query, keys, values)]
    for row in range(rows):
        x = qkv[row].double() if added is None else qkv[row].double() + added.double()
        q, k, v = x.view(-1, hd).split((heads, kv, kv))
        at = int(positions[row])
        wanted[0][row] = exact(q, gains[0], cos[at], sin[at])
        wanted[1][row, :, at] = exact(k, gains[1], cos[at], sin[at])
        wanted[2][row, :, at] = v
    with cases.running(backend):
        rope_write(qkv, added, *gains, cos, sin, positions, keys, values, query, EPS)
    for name, one, other in zip("qkv", wanted, (query, keys, values), strict=True):
        cases.assert_close(name, one, other, cases.RATIO[dtype])


@cases.backends
@cases.active
def test_inactive_rows_write_nothing(backend: str, active: str) -> None:
    rows, count, chosen = cases.listed(active)
    draw = cases.Draw(1)
    cos, sin = tables(draw, 8)
    positions = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32, device=cases.DEVICE)
    keys, values = caches(5, 1, 8, torch.float32)
    query = torch.full((5, 2, 8), math.nan, device=cases.DEVICE)
    with cases.running(backend):
        qkv = draw.normal(5, 32)
        rope_write(
            qkv, None, None, None, cos, sin, positions, keys, values, query, EPS, rows, count
        )
    for cache in (keys, values):
        written = {tuple(place) for place in (~cache.isnan())[:, 0, :, 0].nonzero().tolist()}
        assert written == {(row, row + 1) for row in chosen}
    assert set((~query.isnan())[:, 0, 0].nonzero().flatten().tolist()) == set(chosen)


@cases.backends
def test_several_tokens_of_a_sequence_share_its_row_of_the_cache(backend: str) -> None:
    draw = cases.Draw(2)
    cos, sin = tables(draw, 8)
    qkv = draw.normal(6, 32)
    positions = torch.tensor([2, 3, 4, 0, 1, 2], device=cases.DEVICE)
    keys, values = caches(2, 1, 8, torch.float32)
    query = torch.empty(6, 2, 8, device=cases.DEVICE)
    with cases.running(backend):
        rope_write(qkv, None, None, None, cos, sin, positions, keys, values, query, EPS, tokens=3)
    assert (~values.isnan())[0, 0, :, 0].nonzero().flatten().tolist() == [2, 3, 4]
    assert (~values.isnan())[1, 0, :, 0].nonzero().flatten().tolist() == [0, 1, 2]
    assert torch.equal(values[1, 0, 2], qkv[5, 24:])


@cases.backends
def test_a_position_outside_the_cache_writes_nothing(backend: str) -> None:
    draw = cases.Draw(3)
    cos, sin = tables(draw, 8)
    positions = torch.tensor([CAPACITY, -1, 4], device=cases.DEVICE)
    keys, values = caches(3, 1, 8, torch.float32)
    query = torch.zeros(3, 2, 8, device=cases.DEVICE)
    with cases.running(backend):
        rope_write(
            draw.normal(3, 32), None, None, None, cos, sin, positions, keys, values, query, EPS
        )
    for cache in (keys, values):
        assert (~cache.isnan())[:, 0, :, 0].nonzero().tolist() == [[2, 4]]


@cases.backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_harms_no_other(backend: str, bad: float) -> None:
    draw = cases.Draw(4)
    cos, sin = tables(draw, 8)
    qkv = draw.normal(2, 32)
    qkv[0] = bad
    keys, values = caches(2, 1, 8, torch.float32)
    query = torch.empty(2, 2, 8, device=cases.DEVICE)
    with cases.running(backend):
        at = torch.zeros(2, dtype=torch.int64, device=cases.DEVICE)
        rope_write(qkv, None, None, None, cos, sin, at, keys, values, query, EPS)
    assert not bool(values[0, 0, 0].isfinite().any())
    assert bool(query[1].isfinite().all()) and bool(keys[1, 0, 0].isfinite().all())


def test_shapes_that_do_not_fit_are_one_line_errors() -> None:
    cos = torch.zeros(CAPACITY, 8, device=cases.DEVICE)
    keys, values = caches(2, 1, 8, torch.float32)
    query = torch.zeros(2, 2, 8, device=cases.DEVICE)
    at = torch.zeros(2, dtype=torch.int64, device=cases.DEVICE)

    def call(qkv=(2, 32), tokens=1, gain=None, table=cos) -> None:
        joined = torch.zeros(qkv, device=cases.DEVICE)
        rope_write(
            joined, None, gain, None, table, table, at, keys, values, query, EPS,
            tokens=tokens,
        )  # fmt: skip

    call()
    for wrong, message in (
        ({"qkv": (2, 40)}, "qkv"),
        ({"tokens": 2}, "key_cache"),
        ({"gain": cos[0]}, "or neither"),
        ({"table": cos[:, :6]}, "cos and sin"),
    ):
        with pytest.raises(DeliberateError, match=message) as caught:
            call(**wrong)
        assert "\n" not in str(caught.value)


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(5)
    cos, sin = tables(draw, 8)
    at = torch.tensor([1, 2], device=cases.DEVICE)
    qkv = draw.normal(2, 32)

    def buffers() -> list[Tensor]:
        shapes = ((2, 1, CAPACITY, 8), (2, 1, CAPACITY, 8), (2, 2, 8))
        return [torch.zeros(*shape, device=cases.DEVICE) for shape in shapes]

    def step(x: Tensor) -> Tensor:
        keys, values, query = buffers()
        rope_write(x, None, None, None, cos, sin, at, keys, values, query, EPS)
        return keys.sum() + values.sum() + query

    with cases.running(backend):
        arguments = (qkv, None, None, None, cos, sin, at, *buffers(), EPS)
        torch.library.opcheck(rope_write, arguments)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(qkv), step(qkv))
