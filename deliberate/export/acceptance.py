"""How many drafts of an exported exit other engines accept.

    deliberate export draft tiny --layer 8 --out whole
    deliberate export draft tiny --out draft
    python -m deliberate.export.acceptance whole draft

Two folders are run by transformers (``assistant_model``), two ``.gguf`` files by llama.cpp through
llama-cpp-python. Both verify every draft; answers with drafts are compared with those without.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deliberate.api.gguf import is_gguf
from deliberate.data.prompts import prompt_text
from deliberate.data.word_problems import word_problems
from deliberate.installation import install_extra
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.errors import DeliberateError

# Word problems that neither training nor calibration has seen, tokens of an answer, and drafts of a
# pass by llama.cpp; transformers chooses them by itself.
PROBLEMS, NEW_TOKENS, DRAFTS = 12, 64, 8
# Prompt -> its answer's tokens, and the full-depth passes that made them.
Run = Callable[[str], tuple[list[int], int]]


@dataclass(frozen=True)
class Acceptance:
    """What was counted over all answers.

    Attributes:
        engine: that decoded.
        tokens: of the answers.
        passes: of the whole model with drafts.
        same: answers that are those without drafts.
        answers: all of them.
        seconds, plain_seconds: of processor time with drafts and without, prompts included.
    """

    engine: str
    tokens: int
    passes: int
    same: int
    answers: int
    seconds: float
    plain_seconds: float


def measure(engine: str, plain: Run, drafted: Run, prompts: Sequence[str]) -> Acceptance:
    """Answers every prompt without drafts and with them, in turn; the first prompt is left out."""
    tokens = passes = same = 0
    spent = [0.0, 0.0]
    for place, prompt in enumerate(prompts):
        began = time.process_time()
        expected, _ = plain(prompt)
        between = time.process_time()
        found, count = drafted(prompt)
        ended = time.process_time()
        if place:
            tokens, passes, same = tokens + len(found), passes + count, same + (found == expected)
            spent = [spent[0] + between - began, spent[1] + ended - between]
    return Acceptance(engine, tokens, passes, same, len(prompts) - 1, spent[1], spent[0])


def by_transformers(whole: str, draft: str) -> tuple[Run, Run]:
    """Plain and assisted `generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    large: Any = AutoModelForCausalLM.from_pretrained(whole).eval()
    small: Any = AutoModelForCausalLM.from_pretrained(draft).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    passes = [0]
    large.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def run(**how: Any) -> Run:
        @torch.inference_mode()
        def answer(prompt: str) -> tuple[list[int], int]:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            passes[0] = 0
            made = large.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, **how)
            return made[0, inputs["input_ids"].shape[1] :].tolist(), passes[0]

        return answer

    return run(), run(assistant_model=small)


def by_llama_cpp(whole: str, draft: str) -> tuple[Run, Run]:
    """Plain generation, and with a draft model behind llama-cpp-python's interface for one.

    Raises:
        DeliberateError: it is not installed.
    """
    try:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaDraftModel
    except ImportError:
        raise DeliberateError(
            f"llama-cpp-python is not installed: {install_extra('rivals')}"
        ) from None

    greedy = {"temp": 0.0, "top_k": 1, "repeat_penalty": 1.0}

    def load(path: str, drafts: Any = None) -> Any:
        return Llama(path, n_ctx=512, logits_all=True, draft_model=drafts, verbose=False)

    class Exported(LlamaDraftModel):  # type: ignore[misc]
        """Drafts by another file."""

        def __init__(self) -> None:
            self.model = load(draft)

        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            made = self.model.generate(input_ids.tolist(), **greedy)
            return np.array([next(made) for _ in range(DRAFTS)], dtype=np.intc)

    def run(model: Any) -> Run:
        ends, evaluate, passes = {model.token_eos()}, model.eval, [0]

        def counted(tokens: Sequence[int]) -> None:
            passes[0] += 1
            evaluate(tokens)

        model.eval = counted

        def answer(prompt: str) -> tuple[list[int], int]:
            model.reset()
            passes[0] = 0
            made: list[int] = []
            for token in model.generate(model.tokenize(prompt.encode()), **greedy):
                made.append(int(token))
                if token in ends or len(made) == NEW_TOKENS:
                    break
            return made, passes[0]

        return answer

    return run(load(whole)), run(load(whole, Exported()))


def main(arguments: Sequence[str]) -> None:
    """Prints one line.

    Raises:
        DeliberateError: not two folders or two GGUF files, or other answers with drafts.
    """
    if len(arguments) != 2 or is_gguf(arguments[0]) is not is_gguf(arguments[1]):
        raise DeliberateError(
            "give the whole model and its draft: two folders, or two .gguf files of `deliberate "
            "export draft`"
        )
    engine, load = "transformers", by_transformers
    if is_gguf(arguments[0]):
        engine, load = "llama.cpp", by_llama_cpp
    problems = word_problems("test", size=PROBLEMS, seed=9)
    prompts = [prompt_text(one.question) for one in problems]
    found = measure(engine, *load(*arguments), prompts)
    each, drafted, plain = found.tokens / found.passes, found.seconds, found.plain_seconds
    print(
        f"{found.engine}: {found.tokens} tokens in {found.passes} passes of the whole model, "
        f"{each:.1f} a pass; {found.same} of {found.answers} answers as without drafts; "
        f"{drafted:.2f} s of processor time, without drafts {plain:.2f}"
    )
    if found.same < found.answers:
        raise DeliberateError(f"{found.answers - found.same} answers differ from those without")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
