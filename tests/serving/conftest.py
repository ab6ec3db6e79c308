"""The bundled model that servers of these tests serve, and its tokenizer."""

from __future__ import annotations

import pytest

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel.from_pretrained("tiny")


@pytest.fixture(scope="module")
def tokenizer(request):
    """With the chat template that the module calls TEMPLATE."""
    made = checkpoint.load_tokenizer("tiny")
    made.chat_template = request.module.TEMPLATE
    return made
