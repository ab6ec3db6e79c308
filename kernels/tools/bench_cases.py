"""What the kernel benchmark runs: every op at a model's shapes, its rivals, its bytes.

A case builds one set of tensors and gives the ways to compute the op on them. Bytes are the least
that must move: every input read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from deliberate.kernels.ops import exit_head_triton
from deliberate.kernels.ops import skip_mlp as skip_mlp_module
from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm
from deliberate.kernels.ops.decode_attention import decode_attention
from deliberate.kernels.ops.exit_gate import decide
from deliberate.kernels.ops.exit_head import exit_head_fused, read_head
from deliberate.kernels.ops.int8_linear import TILES as INT8_TILES
from deliberate.kernels.ops.int8_linear import TILES_ONE_ROW as INT8_TILES_ONE_ROW
from deliberate.kernels.ops.int8_linear import int8_linear, int8_linear_triton, quantise
from deliberate.kernels.ops.kv_fill import kv_fill
from deliberate.kernels.ops.rope_write import rope_write
from deliberate.kernels.ops.skip_mlp import skip_mlp, skip_mlp_triton
from deliberate.utils.errors import DeliberateError

Call = Callable[[], object]
Build = Callable[[torch.device, torch.dtype], Mapping[str, Call]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder, from its published configuration."""

    name: str
    width: int
    inner: int
    heads: int
    kv: int
    head_width: int
    vocab: int
    layers: int


MODELS = {
    "qwen2.5-0.5b": Shapes("qwen2.5-0.5b", 896, 4864, 14, 2, 64, 151936, 24),
    "qwen2.5-7b": Shapes("qwen2.5-7b", 3584, 18944, 28, 4, 128, 152064, 28),
    "tiny": Shapes("tiny", 192, 512, 6, 3, 32, 1024, 8),
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: of the registry.
        name: what is particular, "4 of 8 rows" for example.
        least_bytes: bytes that must move in the dtype of ``itemsize`` given to `cases`.
        operations: floating point operations.
        build: (device, dtype) -> ways to compute it on fresh tensors, the op's own as "ours".
    """

    op: str
    name: str
    least_bytes: int
    operations: int
    build: Build


def shapes_of(name: str) -> Shapes:
    """The sizes of a model by name; raises DeliberateError for an unknown one."""
    if name not in MODELS:
        raise DeliberateError(f"model {name!r} has no shapes here; there are: {', '.join(MODELS)}")
    return MODELS[name]


def cases(of: Shapes, itemsize: int, *, tiles: bool = False) -> Iterator[Case]:
    """Every case of a model's sizes; ``tiles`` adds the candidate tiles of the Triton kernels."""
    for rows in (1, 8, 64):
        yield _exit_head(of, itemsize, rows, tiles)
    yield _exit_gate(of, itemsize, 8)
    for rows in (1, 64, 4096):
        yield _add_rmsnorm(of, itemsize, rows)
    for rows, active in ((1, 1), (8, 8), (64, 64), (64, 16), (64, 1), (256, 256), (256, 64)):
        yield _skip_mlp(of, itemsize, rows, active, tiles)
    for rows in (1, 8):
        yield _kv_fill(of, itemsize, rows)
    for rows in (1, 8):
        yield _rope_write(of, itemsize, rows)
    for rows, length in ((1, 512), (1, 4096), (32, 1024)):
        yield _decode_attention(of, itemsize, rows, length)
        yield _decode_attention(of, itemsize, rows, length, block_size=16)
    for rows in (1, 4, 16):
        yield _int8_linear(of, itemsize, rows, tiles)


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    # Scaled as weights are: squares of sums neither overflow nor vanish.
    return torch.randn(*shape, device=device, dtype=torch.float32).mul_(shape[-1] ** -0.5).to(dtype)


def _list(device: torch.device, total: int, active: int) -> tuple[Tensor, Tensor]:
    rows = torch.randperm(total, device=device).to(torch.int32)
    return rows, torch.tensor([active], dtype=torch.int32, device=device)


def _exit_head(of: Shapes, itemsize: int, rows: int, tiles: bool) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        hidden = _normal(device, dtype, rows, of.width)
        gain = torch.ones(of.width, device=device, dtype=dtype)
        weight = _normal(device, dtype, of.vocab, of.width)

        def rival() -> object:
            logits = linear(rms_norm(hidden, (of.width,), gain, 1e-6), weight).float()
            probabilities = torch.softmax(logits, dim=-1)
            return probabilities.topk(2, dim=-1), torch.special.entr(probabilities).sum(dim=-1)

        variants: dict[str, Call] = {
            "ours": lambda: read_head(hidden, weight, gain=gain),
            "linear, softmax, topk, entropy": rival,
            "linear alone": lambda: linear(hidden, weight),
        }
        if tiles:
            known = exit_head_triton.TILES_ONE_ROW if rows == 1 else exit_head_triton.TILES
            for tile in known:
                variants[str(tile)] = lambda tile=tile: exit_head_fused(  # type: ignore[misc]
                    hidden, weight, gain, 1e-6, None, None, None, 0.0, None, None, tile
                )
        return variants

    size = (of.vocab * of.width + rows * of.width) * itemsize
    return Case("exit_head", _rows(rows), size, 2 * rows * of.vocab * of.width, build)


def _exit_gate(of: Shapes, itemsize: int, rows: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        hidden, probe = _normal(device, dtype, rows, of.width), _normal(device, dtype, of.width)
        gain = torch.ones(of.width, device=device, dtype=dtype)
        bias = torch.zeros(1, device=device, dtype=dtype)
        threshold = torch.full((1,), 0.5, device=device)

        def rival() -> object:
            normed = rms_norm(hidden, (of.width,), gain, 1e-6)
            return torch.sigmoid(linear(normed, probe[None], bias).float()) >= threshold

        return {
            "ours": lambda: decide(hidden, probe, bias, threshold, gain=gain),
            "norm, linear, compare (no list)": rival,
        }

    size = (rows + 2) * of.width * itemsize
    return Case("exit_gate", _rows(rows), size, 4 * rows * of.width, build)


def _add_rmsnorm(of: Shapes, itemsize: int, rows: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        residual, addition = (_normal(device, dtype, rows, of.width) for _ in range(2))
        gain = torch.ones(of.width, device=device, dtype=dtype)
        normed = torch.empty_like(residual)

        def rival() -> object:
            residual.add_(addition)
            return rms_norm(residual, (of.width,), gain, 1e-6)

        return {
            "ours": lambda: add_rmsnorm(residual, addition, gain, 1e-6, normed),
            "add_, rms_norm": rival,
        }

    size = (4 * rows + 1) * of.width * itemsize
    return Case("add_rmsnorm", _rows(rows), size, 5 * rows * of.width, build)


def _skip_mlp(of: Shapes, itemsize: int, rows: int, active: int, tiles: bool) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        residual, normed = (_normal(device, dtype, rows, of.width) for _ in range(2))
        gate_up = _normal(device, dtype, 2 * of.inner, of.width)
        down = _normal(device, dtype, of.width, of.inner)
        listed, count = _list(device, rows, active)
        chosen = None if active == rows else listed.long()[:active].clone()

        def rival() -> object:
            x = normed if chosen is None else normed.index_select(0, chosen)
            gate, up = linear(x, gate_up).chunk(2, dim=-1)
            out = linear(silu(gate) * up, down)
            if chosen is None:
                return residual.add_(out)
            return residual.index_add_(0, chosen, out)

        variants: dict[str, Call] = {"ours": lambda: skip_mlp(residual, normed, gate_up, down)}
        if chosen is not None:
            variants = {}
        variants["ours" if chosen is not None else "ours, all listed"] = lambda: skip_mlp(
            residual, normed, gate_up, down, listed, count
        )
        variants["linear, linear (rows known)"] = rival
        if tiles:
            for tile in skip_mlp_module.first_tiles(rows):
                variants[str(tile)] = lambda tile=tile: skip_mlp_triton(  # type: ignore[misc]
                    residual, normed, gate_up, down, listed, count, tile
                )
        return variants

    weights = 3 * of.width * of.inner
    size = (weights + active * (3 * of.width + 2 * of.inner)) * itemsize
    name = _rows(rows) if active == rows else f"{active} of {rows} rows"
    return Case("skip_mlp", name, size, 2 * active * weights, build)


def _kv_fill(of: Shapes, itemsize: int, rows: int) -> Case:
    n, capacity = of.layers // 2, 1024

    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        hidden = _normal(device, dtype, rows, of.width)
        weight = _normal(device, dtype, n, 2, of.kv, of.head_width, of.width)
        bias = _normal(device, dtype, n, 2, of.kv, of.head_width)
        tables = [_normal(device, dtype, capacity, of.head_width) for _ in range(2)]
        positions = torch.full((rows,), 7, device=device)
        caches = [
            torch.zeros(n, rows, of.kv, capacity, of.head_width, device=device, dtype=dtype)
            for _ in range(2)
        ]
        gains = torch.ones(n, of.width, device=device, dtype=dtype)
        cos, sin = (table[positions][:, None, :] for table in tables)

        def rival() -> object:
            """Layer by layer, as a model does it."""
            for layer in range(n):
                normed = rms_norm(hidden, (of.width,), gains[layer], 1e-6)
                both = linear(normed, weight[layer].flatten(0, 2), bias[layer].flatten())
                keys, values = both.view(rows, 2, of.kv, of.head_width).unbind(1)
                low, high = keys.chunk(2, dim=-1)
                keys = keys * cos + torch.cat((-high, low), dim=-1) * sin
                caches[0][layer].index_copy_(2, positions[:1], keys[:, :, None])
                caches[1][layer].index_copy_(2, positions[:1], values[:, :, None])
            return caches

        return {
            "ours": lambda: kv_fill(
                hidden,
                weight,
                bias,
                None,
                tables[0],
                tables[1],
                positions,
                caches[0],
                caches[1],
                1e-6,
                1e-6,
            ),
            "layer by layer": rival,
        }

    product = n * 2 * of.kv * of.head_width
    size = (product * of.width + rows * (product + of.width)) * itemsize
    return Case("kv_fill", f"{n} layers, {_rows(rows)}", size, 2 * rows * product * of.width, build)


def _rope_write(of: Shapes, itemsize: int, rows: int) -> Case:
    heads, capacity = of.heads + 2 * of.kv, 1024

    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        qkv = _normal(device, dtype, rows, heads * of.head_width)
        bias = _normal(device, dtype, heads * of.head_width)
        tables = [_normal(device, dtype, capacity, of.head_width) for _ in range(2)]
        positions = torch.full((rows,), 7, device=device)
        caches = [
            torch.zeros(rows, of.kv, capacity, of.head_width, device=device, dtype=dtype)
            for _ in range(2)
        ]
        query = torch.empty(rows, of.heads, of.head_width, device=device, dtype=dtype)
        cos, sin = (table[positions][:, None, :] for table in tables)

        def rival() -> object:
            """Operator by operator, as a model does it."""
            split = (qkv + bias).view(rows, heads, of.head_width)
            queries, keys, values = split.split((of.heads, of.kv, of.kv), dim=1)
            turned = []
            for part in (queries, keys):
                low, high = part.chunk(2, dim=-1)
                turned.append(part * cos + torch.cat((-high, low), dim=-1) * sin)
            caches[0].index_copy_(2, positions[:1], turned[1][:, :, None])
            caches[1].index_copy_(2, positions[:1], values[:, :, None])
            return turned[0]

        return {
            "ours": lambda: rope_write(
                qkv,
                bias,
                None,
                None,
                tables[0],
                tables[1],
                positions,
                caches[0],
                caches[1],
                query,
                1e-6,
            ),
            "operator by operator": rival,
        }

    size = ((2 * rows + 1) * heads + 2 * rows) * of.head_width * itemsize
    return Case("rope_write", _rows(rows), size, 4 * rows * heads * of.head_width, build)


def _decode_attention(
    of: Shapes, itemsize: int, rows: int, length: int, block_size: int = 0
) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        scale = of.head_width**-0.5
        query = _normal(device, dtype, rows, of.heads, of.head_width)
        keys, values = (
            _normal(device, dtype, rows, of.kv, length, of.head_width) for _ in range(2)
        )
        lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
        out = torch.empty_like(query)
        mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None]
        requested = query[:, :, None]

        def over_rows() -> object:
            return decode_attention(query, keys, values, lengths, scale, out)

        if block_size:
            # As `BlockPools` lays them, blocks of every row in any order.
            each = -(-length // block_size)
            size = (of.kv, rows * each, block_size, of.head_width)
            key_pool, value_pool = (_normal(device, dtype, *size).transpose(0, 1) for _ in range(2))
            table = torch.randperm(rows * each, device=device).to(torch.int32).view(rows, each)
            return {
                "ours": lambda: decode_attention(
                    query, key_pool, value_pool, lengths, scale, out, table=table
                ),
                "ours, over rows": over_rows,
            }
        return {
            "ours": over_rows,
            "sdpa, mask": lambda: scaled_dot_product_attention(
                requested, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            ),
            "sdpa, equal lengths": lambda: scaled_dot_product_attention(
                requested, keys, values, scale=scale, enable_gqa=True
            ),
        }

    size = 2 * rows * of.head_width * (of.kv * length + of.heads) * itemsize
    operations = 4 * rows * of.heads * length * of.head_width
    name = f"{_rows(rows)}, {length} tokens"
    name += f", blocks of {block_size}" if block_size else ""
    return Case("decode_attention", name, size, operations, build)


def _int8_linear(of: Shapes, itemsize: int, rows: int, tiles: bool) -> Case:
    outputs = 2 * of.inner

    def build(device: torch.device, dtype: torch.dtype) -> Mapping[str, Call]:
        x, dense = _normal(device, dtype, rows, of.width), _normal(device, dtype, outputs, of.width)
        weight, scale = quantise(dense)
        variants: dict[str, Call] = {
            "ours": lambda: int8_linear(x, weight, scale),
            "linear, not quantised": lambda: linear(x, dense),
        }
        if tiles:
            for tile in INT8_TILES_ONE_ROW if rows == 1 else INT8_TILES:
                variants[str(tile)] = lambda tile=tile: int8_linear_triton(  # type: ignore[misc]
                    x, weight, scale, None, tile
                )
        return variants

    size = outputs * of.width + 4 * outputs + rows * (of.width + outputs) * itemsize
    return Case("int8_linear", _rows(rows), size, 2 * rows * outputs * of.width, build)


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
