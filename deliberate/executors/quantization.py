"""In which form the fused executor keeps weights: as they are, bfloat16, int8, or blocks.

Reading the weights is what one decoding step on a CPU costs, so half the bytes are nearly half the
time. Only matrices are stored smaller: norms, biases, activations and sums keep the model's dtype.
The C++ kernels keep bfloat16 and int8 in panels (`deliberate.kernels.panels`) and round the
activations of each product with them to bfloat16; sums are float32. Where torch's operators serve
in their place, int8 on a CPU rounds them too, because that is what the fast kernel takes. Blocks
(`deliberate.kernels.blocks`) are read by the C++ kernels alone, with activations rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.kernels.block_panels import in_panels
from deliberate.kernels.block_quantise import quantise_blocks
from deliberate.kernels.blocks import BlockFormat, BlockWeight
from deliberate.kernels.ops.int8_linear import quantise
from deliberate.kernels.panels import bfloat16_panels, int8_panels
from deliberate.utils.errors import DeliberateError

# torch's packed int8 kernel reads 16 weights at a time and does not look where a row ends.
PACKED_MULTIPLE = 16
# A matrix of at least this many bytes is read in several places at once: one sequential stream does
# not fill the memory's bandwidth (17.5 GB/s against 23.4 with four, float32, one thread).
STREAMED_BYTES = 1 << 20
STREAMS = 4
# With more rows than this the usual order of a product is the faster one.
FEW_ROWS = 9
_QUANTISED_ROWS = 256


class Storage(StrEnum):
    """How a matrix is kept."""

    NATIVE = "native"
    BF16 = "bf16"
    INT8 = "int8"
    Q8_0 = "q8_0"  # blocks of 8 bits
    INT4 = "int4"  # blocks of 4 bits (Q4_1); a head whose storage is not named gets 8
    FILE = "file"  # the blocks of the GGUF file that the model was loaded from

    @property
    def in_blocks(self) -> bool:
        """Whether only the C++ kernels read it."""
        return self is Storage.FILE or self in _BLOCK_FORMATS


# Other names that people know: of no storage of its own, and of the blocks in GGUF files.
_NAMES = {"float": Storage.NATIVE, "q4_1": Storage.INT4}
_BLOCK_FORMATS = {Storage.Q8_0: BlockFormat.Q8_0, Storage.INT4: BlockFormat.Q4_1}


class Rows(Enum):
    """How many rows a product has, which decides its form on a CPU and never its value."""

    ONE = auto()
    FEW = auto()
    MANY = auto()

    @classmethod
    def of(cls, count: int) -> Rows:
        """The class of a number of rows."""
        return cls.ONE if count == 1 else cls.FEW if count <= FEW_ROWS else cls.MANY


class Matrix(NamedTuple):
    """A weight ``[N, K]``: any floating dtype with scale None, or int8 with a scale ``[N]``.

    ``ones``: bfloat16 ``[N]``, what torch's packed kernel is given for scales. It would round the
    real ones to bfloat16; they are applied after it.
    """

    weight: Tensor
    scale: Tensor | None = None
    ones: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes read by one product."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


# A matrix as it is kept.
Stored = Matrix | BlockWeight


@dataclass(frozen=True)
class WeightPlan:
    """Storage of every layer's four matrices, and of the head (exit heads with it).

    Attributes:
        layers: one Storage per layer.
        head: of the LM head and of the heads of the exits.
    """

    layers: tuple[Storage, ...]
    head: Storage = Storage.NATIVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(as_storage(one) for one in self.layers))
        object.__setattr__(self, "head", as_storage(self.head))

    @property
    def native(self) -> bool:
        """Whether nothing is stored smaller."""
        return {*self.layers, self.head} == {Storage.NATIVE}

    @property
    def described(self) -> str:
        """The storages in it, for errors."""
        return ", ".join(repr(str(one)) for one in dict.fromkeys((*self.layers, self.head)))

    @property
    def in_blocks(self) -> bool:
        """Whether anything is kept as only the C++ kernels read it."""
        return any(storage.in_blocks for storage in (*self.layers, self.head))

    @classmethod
    def build(
        cls,
        num_layers: int,
        weights: str | Mapping[str, Sequence[int]] | WeightPlan | None = None,
        head: str | None = None,
    ) -> WeightPlan:
        """A plan for a model of `num_layers`.

        Args:
            weights: one storage for all layers and the head ("native", "bf16", "int8", "q8_0",
                "int4", whose head is "q8_0", "file"); or which layers get which, ``{"int8": [2, 3],
                "bf16": [4, 5]}``, the others and the head staying native; or a plan; None for
                native.
            head: storage of the head, where it is not the one that `weights` says.

        Raises:
            DeliberateError: an unknown storage, or a layer that is not there or named twice.
        """
        if isinstance(weights, WeightPlan):
            if len(weights.layers) != num_layers:
                raise DeliberateError(
                    f"a weight plan for {len(weights.layers)} layers: the model has {num_layers}"
                )
            return weights if head is None else cls(weights.layers, as_storage(head))
        if weights is None or isinstance(weights, str):
            everywhere = as_storage(weights or Storage.NATIVE)
            own = Storage.Q8_0 if everywhere is Storage.INT4 else everywhere
            return cls((everywhere,) * num_layers, as_storage(head or own))
        layers = [Storage.NATIVE] * num_layers
        named: set[int] = set()
        for name, chosen in weights.items():
            for layer in chosen:
                if not 0 <= layer < num_layers or layer in named:
                    raise DeliberateError(
                        f"weights name layer {layer} twice or the model lacks it: it has layers "
                        f"0..{num_layers - 1}"
                    )
                named.add(layer)
                layers[layer] = as_storage(name)
        return cls(tuple(layers), as_storage(head or Storage.NATIVE))


def store(weight: Tensor, storage: Storage, *, panels: bool = False) -> Stored:
    """A weight ``[N, K]`` in this form; a copy unless it is kept as it is.

    Args:
        panels: bfloat16 and int8 are laid out for the C++ kernels, which alone read them then.
    """
    weight = weight.detach()
    if storage in _BLOCK_FORMATS:
        part = quantise_blocks(weight, _BLOCK_FORMATS[storage])
        return BlockWeight((in_panels(part),), weight.shape[1])
    if storage is Storage.INT8:
        # By blocks of rows: the intermediate results of a whole matrix would be several times it.
        parts = [quantise(block) for block in weight.split(_QUANTISED_ROWS)]
        small, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        if panels:
            return int8_panels(small, scale)
        wide = torch.promote_types(weight.dtype, torch.float32)
        ones = torch.ones(len(scale), dtype=torch.bfloat16, device=weight.device)
        return Matrix(small, scale.to(wide), ones)
    if storage is Storage.BF16:
        if panels:
            return bfloat16_panels(weight)
        return Matrix(weight.to(torch.bfloat16).contiguous())
    return Matrix(weight)


def joined(matrices: Sequence[BlockWeight]) -> BlockWeight:
    """Matrices of the same width, one below the other."""
    parts = tuple(part for matrix in matrices for part in matrix.parts)
    return BlockWeight(parts, matrices[0].columns)


def joined_rows(stored: Callable[[Tensor], Stored], weight: Tensor, first: int) -> Stored:
    """A weight ``[N, K]`` whose first rows can be left out of a product: of blocks, a part of their
    own."""
    parts = [stored(rows) for rows in (weight[:first], weight[first:])]
    blocks = [part for part in parts if isinstance(part, BlockWeight)]
    return joined(blocks) if blocks else stored(weight)


def widened(matrix: Stored, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` that a product with activations of `dtype` stands for."""
    if isinstance(matrix, BlockWeight):
        return matrix.widen().to(dtype)
    wide = matrix.weight.to(dtype)
    return wide if matrix.scale is None else wide * matrix.scale.to(dtype)[:, None]


def product(x: Tensor, matrix: Stored, rows: Rows | None = None) -> Tensor:
    """``x [..., K]`` times the transpose of a stored weight -> ``[..., N]``, dtype of x.

    Args:
        rows: of x; None takes its shape, which compiled code must not look at.
    """
    if isinstance(matrix, BlockWeight):
        wide = x.reshape(-1, x.shape[-1]).float().contiguous()
        return matrix.multiply(wide).to(x.dtype).view(*x.shape[:-1], -1)
    weight = matrix.weight
    shape = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    if matrix.scale is not None:
        return _int8_product(flat, matrix, matrix.scale).view(*shape, -1)
    if weight.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype))
    if rows is None:
        rows = Rows.of(len(flat))
    if rows is Rows.ONE and torch.compiler.is_compiling():
        return _vector_product(flat[0], weight).view(*shape, -1)
    if rows is Rows.MANY:
        return F.linear(x, weight.to(x.dtype))
    # On a CPU this order is the faster one for a few rows.
    return torch.mm(weight.to(x.dtype), flat.t()).t().reshape(*shape, -1)


def _vector_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [K]`` times the transpose of a weight ``[N, K]``, as sums that the compiler turns into
    one loop: faster than the library's product, and joined with what is around it."""
    streams = STREAMS if weight.nbytes >= STREAMED_BYTES and len(weight) % STREAMS == 0 else 1
    parts = weight.view(streams, len(weight) // streams, -1).unbind(0)
    return torch.cat([(part.to(x.dtype) * x).sum(dim=-1) for part in parts])


def _int8_product(x: Tensor, matrix: Matrix, scale: Tensor) -> Tensor:
    weight = matrix.weight
    packed = (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.shape[1] % PACKED_MULTIPLE == 0
        and matrix.ones is not None
    )
    if packed:
        # The kernel for float32 activations is not vectorised; the one for bfloat16 sums in
        # float32, and each row's result is the same whatever rows are beside it.
        short = x.to(torch.bfloat16).contiguous()
        out = torch._weight_int8pack_mm(short, weight, matrix.ones)  # type: ignore[arg-type]
        return (out.to(scale.dtype) * scale).to(x.dtype)
    return torch.mm(x, weight.to(x.dtype).t()) * scale.to(x.dtype)


def as_storage(value: str) -> Storage:
    """The storage of this name; ``float`` is native, and GGUF's names (Q8_0, Q4_1) are known.

    Raises:
        DeliberateError: there is none.
    """
    name = str(value).lower()
    try:
        return _NAMES.get(name) or Storage(name)
    except ValueError:
        choices = ", ".join((*Storage, *_NAMES))
        raise DeliberateError(f"weights {value!r} are unknown; they are {choices}") from None
