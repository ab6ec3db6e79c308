"""The texts of `deliberate fit` and their hidden states.

Exits and held-out figures need few texts, with the states after several layers, in float32. A draft
layer needs many, with the last states alone, which bfloat16 products give faster where the
processor has them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder, chat_wanted
from deliberate.data.questions import draw_prompts, question_sources
from deliberate.train.draft.draft_trainer import faster_dtype
from deliberate.train.draft.hidden_cache import HiddenCache, bytes_per_token, collect
from deliberate.train.draft.own_text import OwnText, read_own_text, write_own_text
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256

OwnTexts = Sequence[tuple[Sequence[int], int]]
# Seconds between two lines of progress.
_SHOWN = 20.0


def own_texts(
    cfg: DictConfig, how: OwnText, model: AdaptiveModel, tokenizer: Any, work: Path,
    say: Callable[[str], None],
) -> tuple[OwnTexts, str]:  # fmt: skip
    """Own text with prompt lengths, and what identifies it."""
    if cfg.text.file is not None:
        path = Path(cfg.text.file)
        if not path.is_file():
            raise DeliberateError(f"text.file={path} is missing")
        return read_own_text(path), str(path.resolve())
    chat = chat_wanted(str(cfg.chat), tokenizer, system=cfg.system)
    encoder = Encoder(tokenizer, max_tokens=1 << 30, chat=chat, system=cfg.system)
    questions = OmegaConf.to_object(cfg.text.questions) if OmegaConf.is_config(
        cfg.text.questions
    ) else cfg.text.questions  # fmt: skip
    sources = question_sources(questions, chat=chat, data_dir=cfg.data.dir)
    if sources:
        prompts = _asked(cfg, sources, encoder, max(how.batch_size, how.tokens // 32))
    else:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise DeliberateError(
                "the tokenizer has neither bos_token nor eos_token to begin a text with: give "
                "text.questions"
            )
        prompts = [[start]] * max(how.batch_size, how.tokens // 64)
        how = OwnText(**asdict(how) | {"sampled": 1.0, "temperature": 1.0})
    facts = {"how": asdict(how) | {"tokens": 0}, "prompts": prompts}
    digest = json_sha256(facts)[:12]
    path = work / f"own-{digest}.jsonl"
    began, first = time.monotonic(), None

    def note(tokens: int) -> None:
        nonlocal first
        if first is None:
            first = tokens, time.monotonic()
            return
        rate = (tokens - first[0]) / max(1e-9, time.monotonic() - first[1])
        left = max(0.0, how.tokens - tokens) / max(rate, 1e-9) / 60
        say(f"own text: {tokens} of {how.tokens} tokens, {rate:.0f} tokens/s, {left:.0f} min left")

    if cfg.text.weights is not None:
        model = AdaptiveModel.from_pretrained(cfg.model, weights=str(cfg.text.weights))
        model.attach_draft(None)
    total = write_own_text(path, model, tokenizer, prompts, how, note=note)
    say(f"own text: {total} answer tokens in {path} ({time.monotonic() - began:.0f} s)")
    return read_own_text(path), f"{path.name}:{total}"


def _asked(
    cfg: DictConfig, sources: Sequence[str], encoder: Encoder, count: int
) -> list[list[int]]:
    """Prompts of questions; a source that is named twice gives two shares."""
    prompts: list[list[int]] = []
    for name, times in Counter(sources).items():
        prompts += draw_prompts(
            (name,), encoder, count=-(-count * times // len(sources)), longest=1024,
            seed=int(cfg.seed), data_dir=cfg.data.dir,
        )  # fmt: skip
    random.Random(int(cfg.seed)).shuffle(prompts)  # sources mixed in every batch
    return prompts


def exit_states(
    cfg: DictConfig, model: AdaptiveModel, texts: OwnTexts, layers: tuple[int, ...], digest: str,
    work: Path, say: Callable[[str], None],
) -> HiddenCache:  # fmt: skip
    """States after the exits and the last two layers, of as many texts as the exits need."""
    depth = model.backbone.num_layers
    kept = tuple(sorted({*layers, depth - 1, depth} - {0}))
    each = bytes_per_token(len(kept), model.backbone.hidden_size)
    say(f"hidden states after layers {list(kept)}: {each} bytes a token, bfloat16, on disk")
    began = time.monotonic()
    cache = collect(
        work / "states", model.backbone, texts, kept,
        source={"model": str(cfg.model), "text": digest}, most_tokens=int(cfg.cache_tokens),
    )  # fmt: skip
    say(
        f"hidden states: {cache.count} tokens of {len(cache.texts)} texts, "
        f"{cache.count * each / 1e6:.0f} MB ({time.monotonic() - began:.0f} s)"
    )
    return cache


def draft_states(
    cfg: DictConfig, texts: OwnTexts, digest: str, work: Path, say: Callable[[str], None]
) -> HiddenCache:
    """The last states of the texts that the draft layer is trained on."""
    dtype = faster_dtype()
    model = AdaptiveModel.from_pretrained(cfg.model, executor="generic", dtype=dtype)
    backbone = model.backbone
    depth = backbone.num_layers
    each = bytes_per_token(1, backbone.hidden_size)
    shown = str(dtype).removeprefix("torch.")
    say(f"states for the draft layer: {each} bytes a token, products in {shown}")
    began, last = time.monotonic(), time.monotonic()
    first: int | None = None

    def note(tokens: int) -> None:
        nonlocal first, last
        first = tokens if first is None else first
        if time.monotonic() - last > _SHOWN:
            last = time.monotonic()
            say(f"states: {tokens} tokens, {(tokens - first) / (last - began):.0f} tokens/s")

    cache = collect(
        work / "last-states", backbone, texts, (depth,),
        source={"model": str(cfg.model), "text": digest, "dtype": shown},
        most_tokens=int(cfg.cache_tokens), note=note,
    )  # fmt: skip
    say(
        f"states for the draft layer: {cache.count} tokens of {len(cache.texts)} texts, "
        f"{cache.count * each / 1e6:.0f} MB ({time.monotonic() - began:.0f} s)"
    )
    return cache
