"""Fast tokenizers keep padding and truncation in themselves: threads take turns at one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.command import build_server
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.serving.settings import ServerSettings

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("chat", [False, True])
def test_threads_encode_one_after_the_other_and_each_gets_its_own_prompt(monkeypatch, chat) -> None:
    tokenizer = checkpoint.load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATE
    builder = build_server(
        AdaptiveModel.from_pretrained("tiny"), tokenizer, "tiny", ServerSettings()
    ).builder
    texts = [f"{'Tom has 3 apples. ' * (1 + n % 7)}{n}" for n in range(200)]
    alone = [list(tokenizer.encode(text, add_special_tokens=not chat)) for text in texts]
    inside, most, own = [0], [0], threading.Lock()

    def watched(method):
        def call(*args, **given):
            with own:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.0005)  # long enough for another thread to come, were it let in
            try:
                return method(*args, **given)
            finally:
                with own:
                    inside[0] -= 1

        return call

    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(tokenizer, name, watched(getattr(tokenizer, name)))

    def prompt(text: str) -> list[int]:
        if chat:
            messages = [{"role": "user", "content": text}]
            return builder.prompt(ChatRequest(model="tiny", messages=messages))
        return builder.prompt(CompletionRequest(model="tiny", prompt=text))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(prompt, texts)) == alone
    assert most[0] == 1
