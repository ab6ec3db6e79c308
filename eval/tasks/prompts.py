"""The prompt form: the text around a question, and how it is recorded.

Every command that puts questions to a model takes its encoder from here, and every certificate
states the form of the same encoder: what was tested and what is run are described alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from deliberate.calibration.conditions import prompt_ends
from deliberate.data.prompts import PROMPT, Encoder, chat_wanted, has_chat_template
from deliberate.utils.hashing import json_sha256

# Conditions of a certificate that state the prompt form.
PROMPT_TEXT, PROMPT_HASH = "prompt", "prompt_sha256"


def question_encoder(
    tokenizer: Any,
    *,
    chat: str,
    system: str | None,
    max_tokens: int,
    template: str = PROMPT,
) -> Encoder:
    """An encoder of questions.

    Args:
        chat: the tokenizer's chat template: ``auto`` (where there is one), ``always``, ``never``.
        system: the system message of a chat.
        template: the prompt around a question where no chat template is used.

    Raises:
        DeliberateError: an unknown setting, a template that the tokenizer does not have, or a
            system message without one.
    """
    return Encoder(
        tokenizer,
        max_tokens=max_tokens,
        template=template,
        chat=chat_wanted(chat, tokenizer, system=system),
        system=system,
    )


def prompt_encoder(
    cfg: DictConfig, tokenizer: Any, *, max_tokens: int, template: str = PROMPT
) -> Encoder:
    """`question_encoder` of a command's settings ``cfg.chat`` and ``cfg.system``."""
    system = None if cfg.system is None else str(cfg.system)
    return question_encoder(
        tokenizer, chat=str(cfg.chat), system=system, max_tokens=max_tokens, template=template
    )


def prompt_sha256(encoder: Encoder) -> str:
    """Hash of the token ids around a question: template, system message and tokenizer."""
    return json_sha256(encoder.prompt("{question}"))


def run_conditions(
    encoder: Encoder,
    *,
    task: str | None,
    max_new_tokens: int,
    dtype: Any,
    grading: str | None = None,
) -> dict[str, Any]:
    """What answers depend on besides model, policy and problems, as certificates state it.

    Args:
        task: its name; None where the questions are of no task.
        dtype: of the weights, ``torch.float32`` or ``"float32"``.
        grading: where the task finds the answer in a text, which decides what is right; None where
            nothing is graded.
    """
    given = {"task": task, "grading": grading}
    stated = {name: value for name, value in given.items() if value is not None}
    return stated | {
        PROMPT_TEXT: encoder.form,
        PROMPT_HASH: prompt_sha256(encoder),
        "max_new_tokens": int(max_new_tokens),
        "dtype": str(dtype).removeprefix("torch."),
    }


# Questions whose prompts share what is around every question, and as little else as can be.
_QUESTIONS = ("{question}", "A", "1", "why?")


def form_ends(encoder: Encoder, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids around every question: what all prompts of the form begin and end with.

    Args:
        prompts: of the task's questions.
    """
    return prompt_ends([*prompts, *(encoder.prompt(question) for question in _QUESTIONS)])


def condition_departures(
    stated: Mapping[str, Any], run: Mapping[str, Any], tokenizer: Any = None
) -> list[str]:
    """Conditions of a certificate that a run does not keep, in words.

    Args:
        tokenizer: of the run. A certificate without a hash of the prompt form was written before
            the form was recorded; where the tokenizer has a chat template, it is unknown
            whether that was used.
    """
    found = [
        f"{name} {value!r} instead of {stated[name]!r}"
        for name, value in run.items()
        if name in stated and stated[name] != value and name != PROMPT_HASH
    ]
    named = any(text.startswith(f"{PROMPT_TEXT} ") for text in found)
    if PROMPT_HASH in stated and PROMPT_HASH in run:
        if not named and stated[PROMPT_HASH] != run[PROMPT_HASH]:
            found.append("the words of the prompt are the same, but their tokens are others")
    elif PROMPT_TEXT in stated and not named and has_chat_template(tokenizer):
        found.append(
            "the certificate does not record whether the chat template was used: calibrate again"
        )
    return found
