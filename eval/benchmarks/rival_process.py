"""One process of `deliberate bench rivals`: a library with a model at one precision.

It is started with a description as JSON, loads, and answers each request, a line, with a line. Only
one process computes at a time; the others wait for their next line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deliberate.installation import install_extra
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

# Token ids and how many are to be made -> those made.
Answer = Callable[[Sequence[int], int], list[int]]
DTYPES = {"float32": "float32", "bfloat16": "bfloat16"}
# How our own executor keeps weights at each precision; 4 bits of a GGUF file lie in the file.
WEIGHTS = {"float32": "float", "bfloat16": "bf16", "int8": "int8"}


def ours(given: Mapping[str, Any]) -> dict[str, Answer]:
    """Our dense and exact decoding by system."""
    import torch

    from deliberate.api.model import AdaptiveModel
    from deliberate.executors.rotation import rotate_residual

    weights = WEIGHTS.get(given["precision"]) or ("file" if given["file"] else "int4")
    layer = "exact layer" in given["systems"]
    name = given["draft"] if layer and given["draft"] else given["model"]
    how = {"weights": weights, "executor": given["executor"]}
    if given.get("rotate"):
        base: Any = AdaptiveModel.from_pretrained(name, executor="generic").base
        rotate_residual(base)
        model = AdaptiveModel(base, **how).eval()
    else:
        model = AdaptiveModel.from_pretrained(name, **how).eval()

    def by(**how: Any) -> Answer:
        def answer(prompt: Sequence[int], new: int) -> list[int]:
            ids = torch.tensor([list(prompt)])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),  # a chat's markers may be the pad token
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                **how,
            )
            tokens: list[int] = made[0, len(prompt) :].tolist()
            return tokens

        return answer

    exact = {"fidelity": "exact"}
    made = {
        "dense": by(fidelity="dense"),
        "exact": by(**exact),
        "exact lookup": by(**exact, lookup_tokens=6, draft_tokens=0),
        "exact int4": by(**exact, drafts="int4"),
    }
    return made | ({"exact layer": by(**exact)} if layer else {})


def transformers(given: Mapping[str, Any]) -> dict[str, Answer]:
    """Transformers' own `generate`, plain and assisted."""
    import torch
    from transformers import GenerationConfig

    from deliberate.api.model import AdaptiveModel

    base: Any = AdaptiveModel.from_pretrained(
        given["model"], dtype=DTYPES[given["precision"]], executor="generic"
    ).base.eval()
    base.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)

    def by(**how: Any) -> Answer:
        def answer(prompt: Sequence[int], new: int) -> list[int]:
            ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                made = base.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how
                )
            tokens: list[int] = made[0, len(prompt) :].tolist()
            return tokens

        return answer

    layer = given["early_exit_layer"] or base.config.num_hidden_layers * 3 // 4
    return {
        "transformers": by(),
        "transformers lookup": by(prompt_lookup_num_tokens=given["lookup_tokens"]),
        "transformers early exit": by(assistant_early_exit=layer),
    }


def llama_cpp(given: Mapping[str, Any]) -> dict[str, Answer]:
    """llama.cpp by llama-cpp-python, with its own lookup of drafts where that is the system.

    Raises:
        DeliberateError: it is not installed, or there is no GGUF file.
    """
    try:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
    except ImportError:
        need = install_extra("rivals")
        raise DeliberateError(f"llama-cpp-python is not installed: {need}") from None
    if not given["file"]:
        raise DeliberateError("llama.cpp reads a GGUF file: give model=FILE.gguf")
    (name,) = given["systems"]
    tokens = given["lookup_tokens"]
    drafts = LlamaPromptLookupDecoding(num_pred_tokens=tokens) if "lookup" in name else None
    model = Llama(
        given["file"],
        n_ctx=given["context"],
        n_threads=given["threads"],
        n_threads_batch=given["threads"],
        draft_model=drafts,
        logits_all=drafts is not None,
        verbose=False,
    )

    def answer(prompt: Sequence[int], new: int) -> list[int]:
        model.reset()
        made: list[int] = []
        for token in model.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0):
            made.append(int(token))
            if len(made) == new:
                break
        return made

    return {name: answer}


LIBRARIES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Answer]]] = {
    "ours": ours,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}

# What each imports before its memory is looked at: Python's modules are not the model's.
MODULES = {
    "ours": "deliberate.api.model",
    "transformers": "transformers.models.auto.modeling_auto",
    "llama.cpp": "llama_cpp",
}


def answered(answers: Mapping[str, Answer], request: Mapping[str, Any]) -> dict[str, Any]:
    """One request's tokens, seconds by the wall clock and of this process's own time."""
    began, own = time.perf_counter(), time.process_time()
    tokens = answers[request["system"]](request["prompt"], request["new"])
    return {
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
        "own": time.process_time() - own,
    }


def main() -> None:
    """Loads what the first argument describes and answers lines of stdin until it is closed."""
    given = parse_json(sys.argv[1], "the description of a rival")
    # Whatever a library prints goes to stderr; the answers alone are on stdout.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: Mapping[str, Any]) -> None:
        out.write(json.dumps(dict(line)) + "\n")
        out.flush()

    import torch

    torch.set_num_threads(given["threads"])
    with contextlib.suppress(ImportError):  # named below
        importlib.import_module(MODULES[given["library"]])
    before = memory_bytes("VmRSS")
    try:
        answers = LIBRARIES[given["library"]](given)
    except DeliberateError as error:
        say({"missing": str(error)})
        return
    say({"ready": list(answers)})
    for line in sys.stdin:
        request = parse_json(line, "a request to a rival")
        if request.get("memory"):
            say({"bytes": memory_bytes("VmHWM"), "before": before})
            continue
        try:
            say(answered(answers, request))
        except Exception as error:  # any library's own: a rival that fails is named
            text = " ".join(str(error).split()) or "no message"
            say({"failed": f"{type(error).__name__}: {text}"})


def memory_bytes(which: str) -> int:
    """Memory of this process: VmRSS now, VmHWM the most ever."""
    # Linux hands the parent's `ru_maxrss` down; its own high-water mark is in /proc.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
