"""Builds what a training run needs from its configuration (checked by `checks.check_config`)."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.thresholds import (
    describe_thresholds,
    exit_shares,
    read_exits,
    thresholds_in_turn,
)
from deliberate.data.chains import CHAINS, CLOSE_TAG, OPEN_TAG, chain_problems
from deliberate.data.problem import ANSWER_MARK, Problem, mark_of
from deliberate.data.prompts import Encoder, prompt_text, use_chat
from deliberate.data.questions import draw_prompts, question_sources
from deliberate.data.seeds import GYM_TRAINING_OFFSET, THRESHOLD_OFFSET, TOKENIZER_SEED
from deliberate.data.self_generated import SELF, SelfDataConfig, own_documents
from deliberate.data.sources import load_problems, load_reasoning_gym
from deliberate.data.texts import Document, is_text, load_file, load_texts
from deliberate.data.word_problems import split_of, word_problems
from deliberate.modeling.layer_fit import fit_layers
from deliberate.modeling.pruning import keep_layers
from deliberate.reasoning.marks import REASONING_TAGS
from deliberate.train.batches import MixtureBatches, rows_of
from deliberate.train.checks import GYM, WORDS, exit_config
from deliberate.train.objectives.base import Objective
from deliberate.train.recipes import find_recipe
from deliberate.train.rounded_start import start_rounded
from deliberate.train.tokenizer import train_tokenizer

THRESHOLD_BATCHES = 24
# Texts that a new tokenizer is trained on.
TOKENIZER_WORDS, TOKENIZER_PER_SOURCE = 6000, 8000
# Texts that the model generates in a dry run.
DRY_TEXTS = 8

Items = Mapping[str, Sequence[Problem | Document]]


def training_problems(cfg: DictConfig) -> dict[str, Sequence[Problem | Document]]:
    """The fixed training problems and documents by source.

    The grammar's problems are drawn while training; text of the model itself is added by
    `add_own_text`.
    """
    problems: dict[str, Sequence[Problem | Document]] = {}
    for name, weight in cfg.data.weights.items():
        if not weight or name in (WORDS, CHAINS, SELF):
            continue
        if name in cfg.data.files:
            problems[name] = load_file(name, cfg.data.files[name])
        elif is_text(name):
            problems[name] = load_texts(name, data_dir=cfg.data.dir)
        elif name.startswith(GYM):
            drawn = load_reasoning_gym(
                name[len(GYM) :], size=cfg.data.gym_size, seed=GYM_TRAINING_OFFSET + cfg.seed
            )
            problems[name] = [p for p in drawn if split_of(p.question) == "train"]
        else:
            problems[name] = load_problems(
                name, "train", data_dir=cfg.data.dir, hub=cfg.data.hub.get(name)
            )
    return problems


def add_own_text(
    cfg: DictConfig,
    problems: dict[str, Sequence[Problem | Document]],
    model: AdaptiveModel,
    tokenizer: Any,
    folder: Path,
) -> None:
    """Adds documents that the model itself generates, where the mixture has the source ``self``.

    A dry run generates only a few, into a temporary folder.
    """
    if not cfg.data.weights.get(SELF):
        return
    settings: dict[str, Any] = dict(cfg.data.self)
    kept: Any = {"seed": cfg.seed, "source": checkpoint.resolve(cfg.model.path)}
    with tempfile.TemporaryDirectory() as scratch:
        if cfg.dry_run:
            settings["count"] = min(settings["count"], DRY_TEXTS)
            folder = Path(scratch)
        problems[SELF] = own_documents(
            folder,
            model.base,
            tokenizer,
            SelfDataConfig(**settings),
            prompts=_own_prompts(cfg, tokenizer, settings["count"]),
            writes=int(os.environ.get("RANK", 0)) == 0,
            **kept,
        )


def _own_prompts(cfg: DictConfig, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of the questions that the model answers for its own text; empty: no questions."""
    chat = use_chat(cfg.data.chat, tokenizer)
    sources = question_sources(cfg.data.self.questions, chat=chat, data_dir=cfg.data.dir)
    if not sources:
        return []
    longest = cfg.data.self.max_tokens // 2
    drawn = {"count": count, "longest": longest, "seed": cfg.seed, "data_dir": cfg.data.dir}
    return draw_prompts(sources, build_encoder(cfg, tokenizer), **drawn)


def _tokenizer_texts(cfg: DictConfig, problems: Items) -> Iterator[str]:
    every: list[Problem | Document] = []
    if cfg.data.weights.get(WORDS):
        every += word_problems("train", size=TOKENIZER_WORDS, seed=TOKENIZER_SEED)
    if cfg.data.weights.get(CHAINS):
        every += chain_problems("train", size=TOKENIZER_WORDS, seed=TOKENIZER_SEED)
    for group in problems.values():
        every.extend(islice(group, TOKENIZER_PER_SOURCE))
    for item in every:
        if isinstance(item, Document):
            yield item.text
        else:
            question = prompt_text(item.question, cfg.data.prompt)
            yield f"{question} {item.solution or item.answer}"


def _tokenizer(cfg: DictConfig, problems: Items, saved: Path | None) -> Any:
    """A new model's tokenizer: that of the resumed checkpoint, of the teacher, or a trained one."""
    teacher = cfg.recipe.get("teacher")
    if saved is not None or teacher is not None:
        return checkpoint.load_tokenizer(saved or teacher)
    marks = (OPEN_TAG, CLOSE_TAG) if cfg.data.weights.get(CHAINS) else ()
    return train_tokenizer(_tokenizer_texts(cfg, problems), cfg.model.vocab_size, marks=marks)


def build_model(
    cfg: DictConfig,
    problems: Items,
    *,
    tokenizer_from: Path | None = None,
) -> tuple[AdaptiveModel, Any]:
    """The adaptive model to train and its tokenizer.

    A new model's tokenizer is trained on the texts, or read from `tokenizer_from`, the checkpoint
    that is resumed. A student has its teacher's.
    """
    attention = {"attn_implementation": cfg.trainer.attention}
    if cfg.model.kind == "scratch":
        tokenizer = _tokenizer(cfg, problems, tokenizer_from)
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
        exits = exit_config(cfg, cfg.model.layers)
        return AdaptiveModel(new, exits, executor="generic"), tokenizer
    source = checkpoint.resolve(cfg.model.path)
    tokenizer = checkpoint.load_tokenizer(cfg.model.get("tokenizer") or source)
    saved = checkpoint.read_adaptive_config(source)
    kept = cfg.model.get("keep_layers")
    if kept is not None:
        # Exits that the checkpoint has belong to layers that are gone.
        whole = checkpoint.load_base(source if saved is None else saved.base, **attention)
        shallow = keep_layers(whole, list(kept))
        exits = exit_config(cfg, len(kept))
        if cfg.model.get("fit_tokens") and tokenizer_from is None and not cfg.dry_run:
            _fit_student(cfg, shallow, whole, tokenizer, problems)
        return AdaptiveModel(shallow, exits, executor="generic"), tokenizer
    if saved is not None:
        model = AdaptiveModel.from_pretrained(source, executor="generic", **attention)
        # Training changes the weights and exits that the calibration was made for.
        model.set_calibration(None)
    else:
        base = checkpoint.load_base(source, **attention)
        exits = exit_config(cfg, base.config.num_hidden_layers)
        model = AdaptiveModel(base, exits, executor="generic")
    if cfg.model.get("fit_tokens") and tokenizer_from is None and not cfg.dry_run:
        _round_start(cfg, model.base, tokenizer, problems)
    return model, tokenizer


def _fit_texts(cfg: DictConfig, tokenizer: Any, problems: Items) -> list[list[int]]:
    """Training texts that the run does not begin with, of ``model.fit_tokens`` tokens."""
    fresh = cfg.copy()
    fresh.seed = cfg.seed + THRESHOLD_OFFSET
    return rows_of(build_batches(fresh, tokenizer, problems), int(cfg.model.fit_tokens))


def _round_start(cfg: DictConfig, base: Any, tokenizer: Any, problems: Items) -> None:
    """Rounds the layers in closed form, for training under that rounding to start from."""
    texts = _fit_texts(cfg, tokenizer, problems)
    training = base.training
    start_rounded(base.eval(), copy.deepcopy(base), texts, str(cfg.recipe.weights))
    base.train(training)
    print(f"layers rounded in closed form on {sum(map(len, texts)):,} tokens", flush=True)


def _fit_student(
    cfg: DictConfig, student: Any, whole: Any, tokenizer: Any, problems: Items
) -> None:
    """Fits a student's layers on training texts that the run does not begin with."""
    texts = _fit_texts(cfg, tokenizer, problems)
    left = fit_layers(student.eval(), whole.eval(), list(cfg.model.keep_layers), texts)
    shown = ", ".join(f"{one:.2f}" for one in left)
    tokens = sum(map(len, texts))
    print(f"layers fitted on {tokens:,} tokens; of the squared distance of their states from the "
          f"whole model's there is left: {shown}", flush=True)  # fmt: skip
    student.train()


def note_answer_mark(cfg: DictConfig, model: AdaptiveModel) -> None:
    """Writes into the base model's configuration how it learns to mark answers and reasoning.

    Recipes that do not change the base model do not change this.
    """
    mark = mark_of(name for name, weight in cfg.data.weights.items() if weight)
    if mark is not None and not find_recipe(cfg.recipe.name).keeps_base:
        setattr(model.base.config, ANSWER_MARK, mark)
        if cfg.data.weights.get(CHAINS):
            setattr(model.base.config, REASONING_TAGS, [OPEN_TAG, CLOSE_TAG])


def build_objective(cfg: DictConfig, model: AdaptiveModel) -> Objective:
    """The recipe's objective around the model; loads the teacher if there is one."""
    settings: Any = OmegaConf.to_container(cfg.recipe, resolve=True)
    if settings.get("teacher") is not None:
        source = checkpoint.resolve(settings["teacher"])
        settings["teacher"] = checkpoint.load_base(
            source, attn_implementation=cfg.trainer.attention
        )
    objective = find_recipe(settings.pop("name")).objective(model, **settings)
    if cfg.trainer.gradient_checkpointing:
        recompute_layers(model)
    return objective


def recompute_layers(model: AdaptiveModel) -> None:
    """Turns on gradient checkpointing: the backward pass recomputes the layers' activations."""
    # The reentrant form would lose the states that the exits read.
    settings = {"use_reentrant": False}
    enable = getattr(model.base, "activation_checkpointing_enable", None)
    if enable is None:  # its name before transformers 5.20
        enable = model.base.gradient_checkpointing_enable
    enable(settings)


def build_encoder(cfg: DictConfig, tokenizer: Any) -> Encoder:
    """The configured form of prompts and answers."""
    return Encoder(
        tokenizer,
        max_tokens=cfg.data.max_tokens,
        template=cfg.data.prompt,
        chat=use_chat(cfg.data.chat, tokenizer),
        system=cfg.data.system,
        loss_on=cfg.data.loss_on,
    )


def build_batches(cfg: DictConfig, tokenizer: Any, problems: Items) -> MixtureBatches:
    """The run's micro-batches."""
    return MixtureBatches(
        build_encoder(cfg, tokenizer),
        problems,
        dict(cfg.data.weights),
        pools=cfg.trainer.max_steps,
        parts=cfg.trainer.micro_batches,
        tokens_per_step=cfg.trainer.tokens_per_step,
        seed=cfg.seed,
        curriculum=cfg.trainer.curriculum,
        packing=cfg.data.packing,
    )


def set_thresholds(
    cfg: DictConfig, model: AdaptiveModel, tokenizer: Any, problems: Items
) -> list[float]:
    """Sets the least thresholds whose tokens agree with the last layer at the rate
    ``trainer.target_agreement``.

    Measured on training problems that the run has not drawn: its batches under another seed.

    Returns:
        The share of tokens that exits at each exit under these thresholds.
    """
    fresh = cfg.copy()
    fresh.seed = cfg.seed + THRESHOLD_OFFSET
    fresh.trainer.curriculum = 0.0
    batches = build_batches(fresh, tokenizer, problems)
    count = min(len(batches), THRESHOLD_BATCHES)
    sample = (batches[index] for index in range(count))
    target = cfg.trainer.target_agreement
    confidences, agreements = read_exits(model, sample)
    thresholds = thresholds_in_turn(confidences, agreements, target)
    model.set_exit_config(model.exit_config.with_thresholds(thresholds))
    shares = exit_shares(confidences, thresholds)
    print(describe_thresholds(model.exit_config.layers, thresholds, shares, target), flush=True)
    return list(shares)
