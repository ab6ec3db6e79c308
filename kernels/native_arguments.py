"""The structures that the C++ kernels are called with, field by field as in `cpp/`."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int64, c_void_p


class MatrixArgument(ctypes.Structure):
    """``Matrix`` of products.h."""

    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("storage", c_int64),
    )


class LayerArgument(ctypes.Structure):
    """``Layer`` of attention.h."""

    _fields_ = (
        ("qkv", MatrixArgument),
        ("out", MatrixArgument),
        ("gate_up", MatrixArgument),
        ("down", MatrixArgument),
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("eps", c_float),
        ("head_eps", c_float),
    )


# Behind the whole numbers of an entry of the cache: their scale, a float32.
SCALE_BYTES = 4


class KeysValuesArgument(ctypes.Structure):
    """``KeysValues`` of entries.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("row_stride", c_int64),
        ("group", c_int64),
        ("storage", c_int64),
    )


class RunArgument(ctypes.Structure):
    """``Run`` of attention.h."""

    _fields_ = (("position", c_int64), ("slot", c_int64), ("count", c_int64))


class TableArgument(ctypes.Structure):
    """``Table`` of attention.h."""

    _fields_ = (("runs", c_void_p), ("count", c_int64))


class SpanArgument(ctypes.Structure):
    """``Span`` of attention.h."""

    _fields_ = (
        ("row", c_int64),
        ("start", c_int64),
        ("count", c_int64),
        ("offset", c_int64),
        ("holes", c_void_p),
        ("tables", c_void_p),
    )


class HeadArgument(ctypes.Structure):
    """``Head`` of layers.cpp."""

    _fields_ = (
        ("matrix", MatrixArgument),
        ("gain", c_void_p),
        ("factors", c_void_p),
        ("n_factors", c_int64),
        ("eps", c_float),
        ("ids", c_void_p),
    )


class DraftRowArgument(ctypes.Structure):
    """``DraftRow`` of layers.cpp."""

    _fields_ = (
        ("row", c_int64),
        ("tables", c_void_p),
        ("token", c_int64),
        ("start", c_int64),
        ("steps", c_int64),
        ("asked", c_int64),
        ("threshold", c_double),
        ("stops", c_void_p),
        ("n_stops", c_int64),
        ("states", c_void_p),
        ("tokens", c_void_p),
        ("scores", c_void_p),
        ("passes", c_int64),
        ("standing", c_int64),
    )


# In the order in which `deliberate_sizes` tells theirs.
STRUCTURES = (
    *(MatrixArgument, LayerArgument, KeysValuesArgument, SpanArgument, HeadArgument),
    *(RunArgument, TableArgument, DraftRowArgument),
)
