"""What `deliberate bench decode` times: the variants, and the batches that they decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import DynamicCache

from deliberate.api.model import AdaptiveModel
from deliberate.data import seeds
from deliberate.data.word_problems import word_problems
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.trace import GenerationTrace
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch: ids and mask ``[B, n]``."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Answers:
    """What a variant made of a batch: tokens of each sequence, and the traces where it has any."""

    tokens: list[list[int]]
    traces: list[GenerationTrace] = field(default_factory=list)


Variant = Callable[[Prompts], Answers]


def variants(
    model: AdaptiveModel,
    limit: int,
    thresholds: Any,
    suite: str,
    small: AdaptiveModel | None = None,
) -> dict[str, Variant]:
    """The variants by name; all decode the same greedy answer, which `threshold` may change.

    Args:
        small: the same model with int8 weights, whose answers may differ.
    """
    base: Any = model.base
    ends = set(end_tokens(base.generation_config))
    pad = base.generation_config.pad_token_id or 0
    greedy = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": pad}

    def ours(fidelity: str, model: AdaptiveModel = model) -> Variant:
        def run(prompts: Prompts) -> Answers:
            out = model.generate(
                prompts.ids,
                attention_mask=prompts.mask,
                max_new_tokens=limit,
                fidelity=fidelity,
                thresholds=thresholds,
                return_dict_in_generate=True,
            )
            return Answers([trace.tokens for trace in out.traces], out.traces)

        return run

    def stock(**settings: Any) -> Variant:
        def run(prompts: Prompts) -> Answers:
            out = base.generate(
                input_ids=prompts.ids, attention_mask=prompts.mask, **greedy, **settings
            )
            made = out[:, prompts.ids.shape[1] :].tolist()
            return Answers([_until_end(tokens, ends) for tokens in made])

        return run

    made: dict[str, Variant] = {"dense": ours("dense"), "exact": ours("exact")}
    if suite != "adversarial":
        made = {"transformers generate": stock()} | made | {"threshold": ours("threshold")}
    if suite != "batch":
        made["transformers forward loop"] = lambda prompts: Answers(
            [_forward_loop(base, prompts.ids, limit)]
        )
    if suite == "single" and small is not None:
        made |= {f"{fidelity}, int8": ours(fidelity, small) for fidelity in ("dense", "exact")}
    if suite == "single":
        for layer in model.exit_config.layers:
            made[f"assistant_early_exit={layer}"] = stock(assistant_early_exit=layer)
    return made


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Without the padding behind the token that ends an answer."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


@torch.inference_mode()
def _forward_loop(base: Any, ids: Tensor, limit: int) -> list[int]:
    """The leanest greedy loop over the stock model's own forward and DynamicCache."""
    ends = set(end_tokens(base.generation_config))
    cache = DynamicCache(config=base.config)
    made: list[int] = []
    while len(made) < limit:
        out = base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        made.append(int(out.logits[0, -1].argmax()))
        if made[-1] in ends:
            break
        ids = torch.tensor([[made[-1]]], device=base.device)
    return made


def prompts_of(cfg: DictConfig, tokenizer: Any) -> list[Tensor]:
    """Prompt ids ``[1, n]``: fresh word problems, or the lines of a text file."""
    if cfg.prompts < 2:
        raise DeliberateError(f"prompts={cfg.prompts} must be at least 2: a median needs several")
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=10**6)
    count = cfg.prompts + cfg.warmup
    if cfg.text is None:
        low, high = cfg.steps
        own = seeds.WORD_PROBLEMS[seeds.DECODE_BENCHMARK]
        seed = own.of(cfg.seed, f"the {seeds.DECODE_BENCHMARK}")
        made = word_problems("test", size=count, seed=seed, steps=(low, high))
        return [torch.tensor([encoder.prompt(problem.question)]) for problem in made]
    path = Path(cfg.text)
    if not path.is_file():
        raise DeliberateError(f"text={cfg.text} is not a file: one prompt a line is needed")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise DeliberateError(
            f"text={cfg.text} has {len(lines)} prompts; prompts + warmup = {count} are needed"
        )
    return [torch.tensor([tokenizer.encode(line)]) for line in lines[:count]]


def suite_prompts(cfg: DictConfig, suite: str, tokenizer: Any, vocabulary: int) -> list[Prompts]:
    """The batches of a suite, warm-up included."""
    if suite == "single":
        return [Prompts(ids, torch.ones_like(ids)) for ids in prompts_of(cfg, tokenizer)]
    if suite == "adversarial":
        generator = torch.Generator().manual_seed(cfg.seed)
        shape = (cfg.prompts + cfg.warmup, 1, cfg.adversarial_tokens)
        drawn = torch.randint(vocabulary, shape, generator=generator)
        return [Prompts(ids, torch.ones_like(ids)) for ids in drawn]
    batches = max(2, cfg.prompts // cfg.batch_size) + cfg.warmup
    wide = cfg.copy()
    wide.prompts, wide.warmup = batches * cfg.batch_size, 0
    every = prompts_of(wide, tokenizer)
    return [
        left_padded(every[start : start + cfg.batch_size])
        for start in range(0, len(every), cfg.batch_size)
    ]


def left_padded(prompts: Sequence[Tensor]) -> Prompts:
    """One batch of prompts ``[1, n_i]``."""
    width = max(ids.shape[1] for ids in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(prompts):
        ids[row, width - own.shape[1] :] = own[0]
        mask[row, width - own.shape[1] :] = 1
    return Prompts(ids, mask)
