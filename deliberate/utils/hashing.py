"""SHA-256 of tensors and of JSON-ready data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_sha256(named: Mapping[str, Tensor]) -> str:
    """Hash of tensors by name, dtype, shape and bytes, whatever their order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {list(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Hash of JSON-ready data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
