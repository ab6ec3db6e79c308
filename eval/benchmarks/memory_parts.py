"""Where the memory of one answer lies: a table of parts, in megabytes beyond the imports.

    python -m deliberate.eval.benchmarks.memory_parts smollm2-draft file 400 64

It runs in a process of its own, whose peak it is. Weights, drafts and keys and values
are counted from their sizes, pages of libraries' code by the kernel's account (Linux); the rest
is what is left: Python's modules that are imported late, workspaces, and freed memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.rival_process import memory_bytes
from deliberate.modeling.block_modules import BlockEmbedding, BlockLinear
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.errors import DeliberateError


def code_bytes() -> int:
    """Pages of shared libraries that are in this process's memory; other processes share them."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = ".so" in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def weight_bytes(model: AdaptiveModel) -> int:
    """Of the wrapped model, and of what the executor keeps in another form beside it."""
    plan = getattr(model.backbone, "plan", None)
    held = {one.data_ptr(): one.nbytes for one in model.base.parameters()}
    for module in model.base.modules():
        if isinstance(module, BlockLinear | BlockEmbedding):
            held[module.data.data_ptr()] = module.data.nbytes
    copies = plan is not None and not plan.native and not plan.in_blocks
    beside: int = getattr(model.backbone, "bytes_per_token", 0) if copies else 0
    return sum(held.values()) + beside


def parts_of(
    model: AdaptiveModel, prompt: int, new: int, before: Mapping[str, int]
) -> dict[str, float]:
    """Megabytes of each part at the peak, after one answer of exact mode.

    Args:
        prompt, new: tokens.
        before: ``all`` and ``code`` in bytes, before the model was loaded.
    """
    generator = torch.Generator().manual_seed(0)
    rows = model.base.get_input_embeddings().num_embeddings
    ids = torch.randint(0, rows, (1, prompt), generator=generator)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        eos_token_id=None,
        fidelity="exact",
        return_dict_in_generate=True,
    )
    draft = 0
    if model.draft is not None:  # int8: a byte a weight, of the layer and of its rows of the head
        layer = model.draft.layer
        draft = sum(one.numel() for one in layer.parameters())
        draft += layer.config.vocabulary * layer.config.hidden_size
    found = {
        "weights": weight_bytes(model),
        "keys and values": made.batch.cache_bytes,
        "draft layer and its head, int8": draft,
        "pages of libraries' code": code_bytes() - before["code"],
    }
    peak = memory_bytes("VmHWM") - before["all"]
    found["the rest"] = peak - sum(found.values())
    return {name: one / 1e6 for name, one in (found | {"peak": peak}).items()}


def main(arguments: Sequence[str]) -> None:
    """Prints the table for ``MODEL WEIGHTS PROMPT NEW``.

    Raises:
        DeliberateError: other arguments, or a system without /proc.
    """
    if len(arguments) != 4 or not (arguments[2].isdigit() and arguments[3].isdigit()):
        raise DeliberateError(
            f"{' '.join(arguments)!r} is not MODEL WEIGHTS PROMPT_TOKENS NEW_TOKENS, e.g. "
            "smollm2-draft file 400 64"
        )
    if not Path("/proc/self/smaps").is_file():
        raise DeliberateError("parts of memory are read from /proc/self/smaps: Linux is needed")
    torch.set_num_threads(1)
    before = {"all": memory_bytes("VmRSS"), "code": code_bytes()}
    weights: Any = arguments[1]
    model = AdaptiveModel.from_pretrained(arguments[0], weights=weights).eval()
    for name, megabytes in parts_of(model, int(arguments[2]), int(arguments[3]), before).items():
        print(f"{name:32s} {megabytes:8.1f} MB")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
