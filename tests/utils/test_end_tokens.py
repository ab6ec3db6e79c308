"""One rule for what ends an answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from deliberate.utils.end_tokens import end_tokens

TOKENIZER = SimpleNamespace(eos_token_id=7)


@pytest.mark.parametrize(
    ("own", "tokenizer", "expected"),
    [
        (0, TOKENIZER, (0,)),
        (3, None, (3,)),
        ([3, 5], TOKENIZER, (3, 5)),
        ((3,), TOKENIZER, (3,)),
        (torch.tensor([3, 5]), TOKENIZER, (3, 5)),
        (torch.tensor(3), TOKENIZER, (3,)),
        (None, TOKENIZER, (7,)),
        (None, None, ()),
        (None, SimpleNamespace(eos_token_id=None), ()),
    ],
)
def test_the_settings_come_before_the_tokenizer(own, tokenizer, expected) -> None:
    assert end_tokens(GenerationConfig(eos_token_id=own), tokenizer) == expected
    assert end_tokens(SimpleNamespace(eos_token_id=own), tokenizer) == expected


def test_a_model_without_generation_settings_has_the_tokenizers() -> None:
    assert end_tokens(None, TOKENIZER) == (7,) and end_tokens(None) == ()
