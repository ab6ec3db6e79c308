"""Builds what a training run needs from its configuration (checked by `checks.check_config`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig

from deliberate import storage
from deliberate.model import AdaptiveModel
from deliberate.train.batches import Encoder, MixtureBatches, prompt_text
from deliberate.train.checks import GYM, OBJECTIVES, WORDS, exit_config
from deliberate.train.objectives import Objective
from deliberate.train.problem import Problem
from deliberate.train.sources import load_problems, load_reasoning_gym
from deliberate.train.thresholds import choose_thresholds
from deliberate.train.tokenizer import train_tokenizer
from deliberate.train.words import split_of, word_problems

# Far above any seed that an evaluation uses: reasoning-gym draws item i from seed + i.
TRAIN_GYM_SEED = 10_000_000
# Thresholds are chosen on other draws than the weights were trained on.
THRESHOLD_SEED, THRESHOLD_BATCHES = 1_000_003, 24
# Of the texts that a new tokenizer is trained on.
TOKENIZER_WORDS, TOKENIZER_SEED, TOKENIZER_PER_SOURCE = 6000, -1, 8000


def training_problems(cfg: DictConfig) -> dict[str, list[Problem]]:
    """The fixed training problems by source; the grammar is drawn while training."""
    problems: dict[str, list[Problem]] = {}
    for name, weight in cfg.data.weights.items():
        if not weight or name == WORDS:
            continue
        if name.startswith(GYM):
            drawn = load_reasoning_gym(
                name[len(GYM) :], size=cfg.data.gym_size, seed=TRAIN_GYM_SEED + cfg.seed
            )
            problems[name] = [p for p in drawn if split_of(p.question) == "train"]
        else:
            problems[name] = load_problems(
                name, "train", data_dir=cfg.data.dir, hub=cfg.data.hub.get(name)
            )
    return problems


def _tokenizer_texts(problems: Mapping[str, Sequence[Problem]], template: str) -> Iterator[str]:
    every = [*word_problems("train", size=TOKENIZER_WORDS, seed=TOKENIZER_SEED)]
    for group in problems.values():
        every.extend(islice(group, TOKENIZER_PER_SOURCE))
    for problem in every:
        yield f"{prompt_text(problem.question, template)} {problem.solution or problem.answer}"


def build_model(
    cfg: DictConfig,
    problems: Mapping[str, Sequence[Problem]],
    *,
    tokenizer_from: Path | None = None,
) -> tuple[AdaptiveModel, Any]:
    """The adaptive model to train and its tokenizer.

    A new model's tokenizer is trained on the texts, or read from `tokenizer_from`, the checkpoint
    that is resumed: its weights belong to that one.
    """
    attention = {"attn_implementation": cfg.trainer.attention}
    if cfg.model.kind == "scratch":
        if tokenizer_from is None:
            texts = _tokenizer_texts(problems, cfg.data.prompt)
            tokenizer = train_tokenizer(texts, cfg.model.vocab_size)
        else:
            tokenizer = storage.load_tokenizer(tokenizer_from)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=cfg.model.hidden_size,
            intermediate_size=cfg.model.intermediate_size,
            num_hidden_layers=cfg.model.layers,
            num_attention_heads=cfg.model.heads,
            num_key_value_heads=cfg.model.kv_heads,
            max_position_embeddings=cfg.model.max_positions,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
        return AdaptiveModel(new, exit_config(cfg, cfg.model.layers)), tokenizer
    source = storage.resolve(cfg.model.path)
    tokenizer = storage.load_tokenizer(source)
    if storage.read_adaptive_config(source) is not None:
        return AdaptiveModel.from_pretrained(source, **attention), tokenizer
    base = storage.load_base(source, **attention)
    return AdaptiveModel(base, exit_config(cfg, base.config.num_hidden_layers)), tokenizer


def build_objective(cfg: DictConfig, model: AdaptiveModel) -> Objective:
    """The recipe's objective around the model."""
    settings: Any = OmegaConf.to_container(cfg.recipe, resolve=True)
    return OBJECTIVES[settings.pop("name")](model, **settings)


def build_batches(
    cfg: DictConfig, tokenizer: Any, problems: Mapping[str, Sequence[Problem]]
) -> MixtureBatches:
    """The run's micro-batches."""
    encoder = Encoder(tokenizer, max_tokens=cfg.data.max_tokens, template=cfg.data.prompt)
    return MixtureBatches(
        encoder,
        problems,
        dict(cfg.data.weights),
        pools=cfg.trainer.max_steps,
        parts=cfg.trainer.micro_batches,
        tokens_per_step=cfg.trainer.tokens_per_step,
        seed=cfg.seed,
        curriculum=cfg.trainer.curriculum,
    )


def set_thresholds(
    cfg: DictConfig, model: AdaptiveModel, tokenizer: Any, problems: Mapping[str, Sequence[Problem]]
) -> None:
    """Gives the exits the least thresholds that reach ``trainer.target_agreement`` with the top.

    Measured on training problems that this run has not drawn: its batches under another seed.
    """
    fresh = cfg.copy()
    fresh.seed = cfg.seed + THRESHOLD_SEED
    fresh.trainer.curriculum = 0.0
    batches = build_batches(fresh, tokenizer, problems)
    count = min(len(batches), THRESHOLD_BATCHES)
    sample = (batches[index] for index in range(count))
    thresholds = choose_thresholds(model, sample, cfg.trainer.target_agreement)
    model.set_exit_config(model.exit_config.with_thresholds(thresholds))
