"""How a run puts its questions: the tokenizer's chat template, or the plain one."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from deliberate.train.encoder import PROMPT, Encoder, chat_wanted


def asking_encoder(
    cfg: DictConfig, tokenizer: Any, *, max_tokens: int, template: str = PROMPT
) -> Encoder:
    """An encoder of questions as ``cfg.chat`` and ``cfg.system`` have them.

    Args:
        template: the prompt around a question where no chat template is used.

    Raises:
        DeliberateError: a setting that is none, or a template that the tokenizer does not have.
    """
    return Encoder(
        tokenizer,
        max_tokens=max_tokens,
        template=template,
        chat=chat_wanted(str(cfg.chat), tokenizer, system=cfg.system),
        system=cfg.system,
    )
