"""Training text that the model writes itself, for users who have no data.

What a model says is what its exits will have to predict, so its own samples serve to distil exits
and to calibrate them (data-free distillation as in LLM-QAT: Liu et al., 2023, arXiv:2305.17888).
Written as JSON lines, one text a line with its exact token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deliberate import storage
from deliberate.errors import DeliberateError
from deliberate.train.sources import file_rows
from deliberate.train.texts import Document

SELF = "self"


@dataclass(frozen=True)
class SelfDataConfig:
    """How the model's own text is made.

    Attributes:
        count: texts.
        max_tokens: most tokens of one, the first included.
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: least probability mass that is sampled from, in (0, 1].
        sampled_prefix: with temperature 0, so many first tokens are sampled all the same: without,
            every text from the same beginning would be the same.
        batch_size: texts made at a time.
    """

    count: int = 512
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    sampled_prefix: int = 4
    batch_size: int = 32

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
        # A token stays where what comes before it has not reached the mass yet: one always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate_batch(
    model: Any, first: Sequence[int], config: SelfDataConfig, generator: torch.Generator,
    *, rows: int, end: int | None,
) -> list[list[int]]:  # fmt: skip
    """Token ids of `rows` texts that begin with `first`, without the end mark.

    Args:
        model: a transformers causal language model; its cache is its own.
        first: at least one token.
        generator: on the CPU; equal states give equal texts.
        end: the token that ends a text, which then is left out.
    """
    ids = torch.tensor([list(first)] * rows, device=model.device)
    texts: list[list[int]] = [list(first) for _ in range(rows)]
    open_rows = [True] * rows
    cache, step = None, ids
    for number in range(config.max_tokens - len(first)):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        greedy = config.temperature == 0 and number >= config.sampled_prefix
        chosen = choose(
            out.logits[:, -1].cpu(),
            temperature=0.0 if greedy else config.temperature or 1.0,
            top_p=config.top_p,
            generator=generator,
        )
        for row, token in enumerate(chosen.tolist()):
            open_rows[row] = open_rows[row] and token != end
            if open_rows[row]:
                texts[row].append(token)
        if not any(open_rows):
            break
        step = chosen.to(model.device)[:, None]
    return texts


def generate_texts(
    model: Any, tokenizer: Any, config: SelfDataConfig, *, seed: int
) -> Iterator[tuple[str, list[int]]]:
    """Texts of the model and their ids, the first token left out where it is the beginning mark.

    Raises:
        DeliberateError: the tokenizer has neither a beginning nor an end mark to start from.
    """
    bos = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if bos is None else bos
    if start is None:
        raise DeliberateError("the tokenizer has no mark that a text could begin with")
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    made = 0
    while made < config.count:
        rows = min(config.batch_size, config.count - made)
        for ids in generate_batch(
            model, [start], config, generator, rows=rows, end=tokenizer.eos_token_id
        ):
            yield tokenizer.decode(ids[1:]), ids[1:]
        made += rows
    model.train(was_training)


def write_texts(
    path: Path, model: Any, tokenizer: Any, config: SelfDataConfig, *, seed: int
) -> int:
    """Writes the texts as JSON lines (``text``, ``tokens``), the whole file or none; how many.

    Texts that end at once are left out.
    """
    lines = [
        json.dumps({"text": text, "tokens": ids}, ensure_ascii=False)
        for text, ids in generate_texts(model, tokenizer, config, seed=seed)
        if ids
    ]
    if not lines:
        raise DeliberateError("the model ended every text at once: it cannot make its own data")
    storage.write_text(path, "\n".join(lines) + "\n")
    return len(lines)


def read_texts(path: Path) -> list[Document]:
    """The documents of a file that `write_texts` wrote."""
    documents = []
    for where, row in file_rows(path):
        tokens = row.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise DeliberateError(f"{where} has no list of token ids in 'tokens'")
        documents.append(Document(str(row.get("text", "")), tuple(tokens)))
    if not documents:
        raise DeliberateError(f"{path} has no rows")
    return documents


def own_documents(
    folder: Path, model: Any, tokenizer: Any, config: SelfDataConfig, *,
    source: str, seed: int, writes: bool, patience: float = 24 * 3600.0,
) -> list[Document]:  # fmt: skip
    """The model's own documents for a run in `folder`: made once, read by every process.

    The file's name holds a digest of all that its content hangs on, so that a resumed run finds
    its text again and another setting does not find the wrong one.

    Args:
        source: what the model was loaded from.
        writes: this process makes the file; the others wait for it, `patience` seconds at most.
    """
    facts = [asdict(config), seed, str(Path(source).resolve()), _stamps(source)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"self-{digest}.jsonl"
    if not path.is_file() and writes:
        print(f"self-generated data: {config.count} texts of up to {config.max_tokens} tokens "
              f"into {path}", flush=True)  # fmt: skip
        write_texts(path, model, tokenizer, config, seed=seed)
    deadline = time.monotonic() + patience
    while not path.is_file():
        if time.monotonic() > deadline:
            raise DeliberateError(f"{path} was not written within {patience:.0f} s")
        time.sleep(0.2)
    return read_texts(path)


def _stamps(source: str) -> list[tuple[str, int, int]]:
    if not os.path.isdir(source):
        return []
    files = sorted(Path(source).glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
