"""Questions of train splits that a model answers itself, to generate its own training text."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deliberate.data.prompts import Encoder
from deliberate.data.sources import DATA_VARIABLE, SOURCES, check_training_sources, load_problems
from deliberate.data.word_problems import word_problems
from deliberate.utils.errors import DeliberateError

AUTO, NONE, WORDS = "auto", "none", "words"
_FILES = tuple(name for name in SOURCES if name != "math500")


def question_sources(setting: Any, *, chat: bool, data_dir: str | Path | None) -> tuple[str, ...]:
    """The sources of the questions, by their train splits; empty: the model writes without one.

    Args:
        setting: ``data.self.questions``: ``auto``, ``none``, or a list of names. ``auto`` gives a
            chat model the train splits in the data folder, or word problems where it has none;
            any other model writes without questions.
        chat: the tokenizer's chat template is used.

    Raises:
        DeliberateError: another setting, an unknown source, or a test split.
    """
    if setting == NONE or (setting == AUTO and not chat):
        return ()
    if setting == AUTO:
        root = data_dir or os.environ.get(DATA_VARIABLE)
        found = [n for n in _FILES if root and (Path(root) / n / "train.jsonl").is_file()]
        return tuple(found) or (WORDS,)
    if isinstance(setting, str) or not isinstance(setting, Sequence) or not setting:
        raise DeliberateError(
            f"data.self.questions={setting} must be {AUTO}, {NONE} or a list of sources, e.g. "
            f"[{WORDS},gsm8k]"
        )
    names = tuple(str(name) for name in setting)
    check_training_sources(names)
    for name in names:
        if name not in (WORDS, *_FILES):
            raise DeliberateError(
                f"data.self.questions: unknown source {name!r}: one of {WORDS}, {', '.join(_FILES)}"
            )
    return names


def draw_prompts(
    sources: Sequence[str],
    encoder: Encoder,
    *,
    count: int,
    longest: int,
    seed: int,
    data_dir: str | Path | None = None,
) -> list[list[int]]:
    """Token ids of at most `count` distinct questions, each in the prompt format of `encoder`.

    Args:
        sources: of `question_sources`; each gives an equal share where it has enough.
        longest: longer prompts are left out.
        seed: of the draw.

    Raises:
        DeliberateError: every prompt is longer, or a source cannot be read.
    """
    share = -(-count // len(sources))
    prompts = []
    for name in sources:
        problems = (
            list(word_problems("train", size=share, seed=seed))
            if name == WORDS
            else load_problems(name, "train", data_dir=data_dir)
        )
        random.Random(f"questions:{seed}:{name}").shuffle(problems)
        encoded = (encoder.prompt(problem.question) for problem in problems)
        short = (ids for ids in encoded if len(ids) <= longest)
        prompts += [ids for ids, _ in zip(short, range(share), strict=False)]
    if not prompts:
        raise DeliberateError(
            f"no question of {', '.join(sources)} has at most {longest} tokens, half of "
            "data.self.max_tokens: raise it"
        )
    return prompts[:count]
