"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before the first
import of Triton; importing some transformers models is such an import, so a test module is too
late. With a GPU nothing is set and the same tests run the compiled kernels."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
