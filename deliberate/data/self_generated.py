"""Training text that the model generates itself, for users who have no data.

The exits will have to predict the text that the model generates, so its own samples serve to
distil and calibrate exits (data-free distillation as in LLM-QAT: Liu et al., 2023,
arXiv:2305.17888). Stored as JSON lines, one text a line with its exact token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deliberate.data.sources import file_rows
from deliberate.data.texts import Document
from deliberate.utils.durations import hours_and_minutes
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

SELF = "self"
# The time left is printed after the first batch where that took so many seconds.
_PRINT_AFTER = 5.0


@dataclass(frozen=True)
class SelfDataConfig:
    """How the model's own text is generated.

    Attributes:
        count: texts.
        max_tokens: longest text, its first token included.
        temperature: of the sampling; 0 is greedy.
        top_p: nucleus sampling from the most likely tokens of this total probability, in (0, 1].
        sampled_prefix: with temperature 0, so many first tokens are still sampled, since greedy
            texts with the same first token would all be equal.
        batch_size: texts generated at a time.
        questions: which questions the model answers, see `questions.question_sources`.
    """

    count: int = 512
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    sampled_prefix: int = 4
    batch_size: int = 32
    questions: Any = "auto"

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("max_tokens", 2), ("batch_size", 1),
                            ("sampled_prefix", 0)):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DeliberateError(
                    f"data.self.{name}={value} must be a whole number of at least {least}"
                )
        if not self.temperature >= 0:
            raise DeliberateError(f"data.self.temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise DeliberateError(f"data.self.top_p={self.top_p} must be within (0, 1]")


def choose(
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """The next token of each row of ``logits [B, V]``, int64 ``[B]``; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        # Kept: tokens before which the total is still below top_p; the first always is.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], config: SelfDataConfig,
    generator: torch.Generator, *, sampled_prefix: int, ends: Collection[int | None],
) -> list[tuple[list[int], int | None]]:  # fmt: skip
    """Token ids of a text that continues each prompt, and the end token that ended it, or None.

    Args:
        model: a transformers causal language model.
        prompts: at least one token each; shorter ones are padded on the left.
        generator: on the CPU; equal states give equal texts.
        sampled_prefix: with temperature 0, so many first tokens are still sampled.
        ends: tokens that end a text; they are not part of it.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    mask = mask.to(model.device)
    ragged = not bool(mask.all())
    texts: list[list[int]] = [list(prompt) for prompt in prompts]
    ended: list[int | None] = [None] * len(prompts)
    open_rows = [len(prompt) < config.max_tokens for prompt in prompts]
    cache, step = None, ids.to(model.device)
    for number in range(config.max_tokens - min(map(len, prompts))):
        places: dict[str, Tensor] = {}
        if ragged:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            places = {"attention_mask": mask, "position_ids": positions[:, -step.shape[1] :]}
        out = model(input_ids=step, past_key_values=cache, use_cache=True, **places)
        cache = out.past_key_values
        greedy = config.temperature == 0 and number >= sampled_prefix
        chosen = choose(
            out.logits[:, -1].cpu(),
            temperature=0.0 if greedy else config.temperature or 1.0,
            top_p=config.top_p,
            generator=generator,
        )
        for row, token in enumerate(chosen.tolist()):
            if open_rows[row] and token in ends:
                open_rows[row], ended[row] = False, token
            elif open_rows[row]:
                texts[row].append(token)
                open_rows[row] = len(texts[row]) < config.max_tokens
        if not any(open_rows):
            break
        step = chosen.to(model.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return list(zip(texts, ended, strict=True))


def generate_texts(
    model: Any, tokenizer: Any, config: SelfDataConfig, *, seed: int
) -> Iterator[tuple[str, list[int]]]:
    """Texts of the model and their ids, without the begin-of-text token.

    Raises:
        DeliberateError: the tokenizer has neither a begin- nor an end-of-text token to start from.
    """
    bos = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if bos is None else bos
    if start is None:
        raise DeliberateError(
            "the tokenizer has neither bos_token nor eos_token to begin a text with: set one, or "
            "take other data than data=self"
        )
    settings = {"sampled_prefix": config.sampled_prefix, "ends": set(end_tokens(None, tokenizer))}
    for ids, _ in _in_batches(model, [[start]] * config.count, config, seed=seed, **settings):
        yield tokenizer.decode(ids[1:]), ids[1:]


def generate_answers(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, config: SelfDataConfig, *,
    seed: int,
) -> Iterator[tuple[list[int], int]]:  # fmt: skip
    """Prompts with the model's answers, the end token included, and the length of each prompt.

    With temperature 0 decoding is greedy from the first token on.
    """
    settings = getattr(model, "generation_config", None)
    ends = {*end_tokens(settings), *end_tokens(None, tokenizer)}
    ordered = sorted(prompts, key=len)  # rows of a batch of similar length need little padding
    made = _in_batches(model, ordered, config, seed=seed, sampled_prefix=0, ends=ends)
    for prompt, (ids, end) in zip(ordered, made, strict=True):
        yield ids if end is None else [*ids, end], len(prompt)


def _in_batches(
    model: Any, prompts: Sequence[Sequence[int]], config: SelfDataConfig, *, seed: int, **how: Any
) -> Iterator[tuple[list[int], int | None]]:
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    began, size = time.monotonic(), config.batch_size
    for start in range(0, len(prompts), size):
        yield from generate_batch(model, prompts[start : start + size], config, generator, **how)
        done, took = min(start + size, len(prompts)), time.monotonic() - began
        if start == 0 and done < len(prompts) and took > _PRINT_AFTER:
            left = took / done * (len(prompts) - done)
            print(
                f"self-generated data: {done} of {len(prompts)} texts in "
                f"{hours_and_minutes(took)}, about {hours_and_minutes(left)} left",
                flush=True,
            )
    model.train(was_training)


def write_texts(
    path: Path,
    model: Any,
    tokenizer: Any,
    config: SelfDataConfig,
    *,
    seed: int,
    prompts: Sequence[Sequence[int]] = (),
) -> int:
    """Writes the texts as JSON lines (``text``, ``tokens``), atomically; returns their number.

    Answers to `prompts`, if there are any, else texts without a prompt; the row of an answer also
    has the number of prompt tokens (``prompt``). Empty texts are left out.
    """
    rows: list[dict[str, Any]]
    if prompts:
        answers = generate_answers(model, prompts, tokenizer, config, seed=seed)
        rows = [
            {"text": tokenizer.decode(ids), "tokens": ids, "prompt": length}
            for ids, length in answers
            if len(ids) > length + 1
        ]
    else:
        texts = generate_texts(model, tokenizer, config, seed=seed)
        rows = [{"text": text, "tokens": ids} for text, ids in texts if ids]
    if not rows:
        raise DeliberateError(
            "data=self: the model generated only empty texts: take other data, or raise "
            "data.self.temperature"
        )
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "\n".join(lines) + "\n")
    return len(lines)


def read_texts(path: Path) -> list[Document]:
    """The documents of a file that `write_texts` wrote."""
    documents = []
    for where, row in file_rows(path):
        tokens = row.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise DeliberateError(f"{where} has no list of token ids in 'tokens'")
        prompt = row.get("prompt", 0)
        if not isinstance(prompt, int) or isinstance(prompt, bool) or not 0 <= prompt < len(tokens):
            raise DeliberateError(
                f"{where} has prompt={prompt} but {len(tokens)} tokens: it must be a smaller count"
            )
        documents.append(Document(str(row.get("text", "")), tuple(tokens), prompt))
    if not documents:
        raise DeliberateError(f"{path} has no rows")
    return documents


def own_documents(
    folder: Path, model: Any, tokenizer: Any, config: SelfDataConfig, *,
    source: str, seed: int, writes: bool, prompts: Sequence[Sequence[int]] = (),
    timeout: float = 24 * 3600.0,
) -> list[Document]:  # fmt: skip
    """The model's own documents for a run in `folder`: generated once, read by every process.

    The file's name has a digest of all that its content depends on, so that a resumed run finds its
    text and a run of other settings does not.

    Args:
        source: what the model was loaded from.
        prompts: token ids of the questions to answer; empty: texts without a prompt.
        writes: this process writes the file; the others wait for it, `timeout` seconds at most.
    """
    settings = {name: value for name, value in asdict(config).items() if name != "questions"}
    facts = [settings, seed, str(Path(source).resolve()), _stamps(source)]
    if prompts:
        facts.append([list(prompt) for prompt in prompts])
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"self-{digest}.jsonl"
    if not path.is_file() and writes:
        what = f"answers to {len(prompts)} questions" if prompts else f"{config.count} texts"
        print(f"self-generated data: {what} of up to {config.max_tokens} tokens into {path}",
              flush=True)  # fmt: skip
        write_texts(path, model, tokenizer, config, seed=seed, prompts=prompts)
    deadline = time.monotonic() + timeout
    while not path.is_file():
        if time.monotonic() > deadline:
            raise DeliberateError(f"{path} was not written within {timeout:.0f} s")
        time.sleep(0.2)
    return read_texts(path)


def _stamps(source: str) -> list[tuple[str, int, int]]:
    if not os.path.isdir(source):
        return []
    files = sorted(Path(source).glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
