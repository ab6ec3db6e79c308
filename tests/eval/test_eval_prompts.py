"""Every command that asks questions asks them as training and `deliberate eval` do."""

from __future__ import annotations

import copy

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api import checkpoint
from deliberate.eval.benchmarks.agreement import held_out
from deliberate.eval.benchmarks.decode_variants import prompts_of
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

ASKING = ("bench", "bench_cost", "bench_budget", "bench_gate", "bench_agreement", "bench_exits",
          "bench_longtext", "calibrate", "eval")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return checkpoint.load_tokenizer(save_checkpoint(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def chatty(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    return copied


@pytest.mark.parametrize("command", ASKING)
def test_a_chat_template_is_used_where_there_is_one(command, tokenizer, chatty):
    def requested(own, *overrides):
        cfg = compose(command, list(overrides))
        encoder = prompt_encoder(cfg, own, max_tokens=1000, template="Question: {question}")
        return own.decode(encoder.prompt("Is it?")).removeprefix("<|bos|>")

    assert requested(tokenizer) == requested(chatty, "chat=never") == "Question: Is it?"
    assert requested(chatty) == requested(chatty, "chat=always") == "<user>Is it?"
    assert requested(chatty, "system=Think.") == "<system>Think.<user>Is it?"
    with pytest.raises(DeliberateError, match="chat=always: the tokenizer has no chat template"):
        requested(tokenizer, "chat=always")
    with pytest.raises(DeliberateError, match="needs a chat template"):
        requested(tokenizer, "system=Think.")


def test_the_prompts_of_benchmarks_stand_in_it(tokenizer, chatty):
    cfg = compose("bench", ["prompts=2", "warmup=0"])
    agreement = compose("bench_agreement", ["source=words", "size=8"])
    for own, begins in ((tokenizer, "Question: "), (chatty, "<user>")):
        every = [ids[0] for ids in prompts_of(cfg, own)]
        every += [torch.tensor(ids) for ids in held_out(agreement, own, 4096).prompts]
        texts = [own.decode(ids).removeprefix("<|bos|>") for ids in every]
        assert len(texts) == 10 and all(text.startswith(begins) for text in texts)
