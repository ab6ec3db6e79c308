"""Checks of a training configuration: what cannot work is one line, before anything is written.

Only cheap things are read: a model's `config.json`, the first row of each data set.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from deliberate import storage
from deliberate.backbone import ARCHITECTURES
from deliberate.config import ExitConfig
from deliberate.errors import DeliberateError
from deliberate.train.losses import exit_loss_weights, layer_dropout_rates
from deliberate.train.objectives import HeadsObjective, Objective, PretrainObjective
from deliberate.train.optim import OPTIMIZERS
from deliberate.train.sources import (
    SOURCES,
    check_training_sources,
    load_problems,
    load_reasoning_gym,
)

WORDS = "words"
GYM = "gym/"
OBJECTIVES: Mapping[str, type[Objective]] = {
    "pretrain": PretrainObjective,
    "heads": HeadsObjective,
}
MODEL_KINDS = ("scratch", "folder")
_BYTES_AND_SPECIALS = 256 + 3


def check_config(cfg: DictConfig) -> None:
    """Raises a one-line error for a configuration that cannot work, before any work starts.

    Raises:
        DeliberateError: names the key, its value and what would be right.
    """
    _whole(cfg, "seed", least=0, most=2**32 - 1)
    _choice(cfg, "recipe.name", OBJECTIVES)
    _choice(cfg, "model.kind", MODEL_KINDS)
    if cfg.recipe.name == "pretrain" and cfg.model.kind != "scratch":
        raise DeliberateError(
            f"recipe 'pretrain' trains from scratch but model.kind is {cfg.model.kind!r}: "
            "use model=scratch, or recipe=heads"
        )
    if cfg.recipe.name == "heads" and cfg.model.kind == "scratch":
        raise DeliberateError(
            "recipe 'heads' needs a trained model: give model=folder model.path=..."
        )
    _check_trainer(cfg)
    _check_logger(cfg)
    num_layers = _check_scratch(cfg) if cfg.model.kind == "scratch" else _check_folder(cfg)
    _check_recipe(cfg, exit_config(cfg, num_layers))
    check_output(cfg)
    _check_data(cfg)


def exit_config(cfg: DictConfig, num_layers: int) -> ExitConfig:
    """The configured exits for a model of so many layers."""
    settings: Any = OmegaConf.to_container(cfg.exits, resolve=True)
    known = {field.name for field in fields(ExitConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise DeliberateError(
            f"unknown setting exits.{unknown[0]}; known: {', '.join(sorted(known))}"
        )
    return ExitConfig.build(
        num_layers, settings.pop("layers"), settings.pop("thresholds"), **settings
    )


def check_output(cfg: DictConfig) -> Path:
    """The folder that the run writes to: new, without checkpoints, or resumed."""
    folder = Path(cfg.output_dir)
    if folder.exists() and not folder.is_dir():
        raise DeliberateError(f"output_dir={folder} is a file: give a folder")
    if not cfg.resume and any(folder.glob("checkpoint-*")):
        raise DeliberateError(
            f"output_dir={folder} already holds checkpoints: add resume=true, or choose another"
        )
    return folder


def _check_trainer(cfg: DictConfig) -> None:
    for name in ("max_steps", "tokens_per_step", "micro_batches", "processes"):
        _whole(cfg, f"trainer.{name}", least=1)
    for name in ("log_every", "save_every"):
        _whole(cfg, f"trainer.{name}", least=1)
    _whole(cfg, "trainer.warmup_steps", least=0)
    if cfg.trainer.micro_batches % cfg.trainer.processes:
        raise DeliberateError(
            f"trainer.micro_batches={cfg.trainer.micro_batches} must be a multiple of "
            f"trainer.processes={cfg.trainer.processes}"
        )
    _number(cfg, "trainer.learning_rate", "above 0", lambda value: value > 0)
    for name in ("weight_decay", "max_grad_norm"):
        _number(cfg, f"trainer.{name}", "at least 0", lambda value: value >= 0)
    for name in ("decay_share", "curriculum"):
        _number(cfg, f"trainer.{name}", "within [0, 1]", lambda value: 0 <= value <= 1)
    _choice(cfg, "trainer.optimizer", OPTIMIZERS)
    _choice(cfg, "trainer.attention", ("eager", "sdpa"))
    _choice(cfg, "trainer.bf16", ("auto", True, False))


def _check_logger(cfg: DictConfig) -> None:
    _choice(cfg, "logger.name", ("none", "wandb"))
    if cfg.logger.name == "wandb":
        _choice(cfg, "logger.mode", ("offline", "online", "disabled"))
        if importlib.util.find_spec("wandb") is None:
            raise DeliberateError(
                "logger=wandb needs the package `wandb`: pip install 'deliberate[wandb]'"
            )


def _check_scratch(cfg: DictConfig) -> int:
    """Checks the shape of a new model; its number of layers."""
    for name in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads"):
        _whole(cfg, f"model.{name}", least=1)
    _whole(cfg, "model.vocab_size", least=_BYTES_AND_SPECIALS)
    _whole(cfg, "model.max_positions", least=1)
    heads, width = cfg.model.heads, cfg.model.hidden_size
    if width % heads or (width // heads) % 2:
        raise DeliberateError(
            f"model.hidden_size={width} must split into {heads} heads of even width"
        )
    if heads % cfg.model.kv_heads:
        raise DeliberateError(
            f"model.heads={heads} must be a multiple of model.kv_heads={cfg.model.kv_heads}"
        )
    _check_positions(cfg, cfg.model.max_positions)
    return cfg.model.layers


def _check_folder(cfg: DictConfig) -> int:
    """Reads a checkpoint's `config.json`, not its weights; its number of layers."""
    source = storage.resolve(cfg.model.path)
    saved = storage.read_adaptive_config(source)
    base = source if saved is None else saved.base
    try:
        config: Any = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeliberateError(f"model.path={cfg.model.path}: {first}") from None
    if config.model_type not in ARCHITECTURES:
        raise DeliberateError(
            f"model.path={cfg.model.path}: architecture {config.model_type!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    wanted = cfg.exits.layers
    if saved is not None and wanted != "auto" and list(wanted) != list(saved.exits["layers"]):
        raise DeliberateError(
            f"exits.layers={list(wanted)} but {cfg.model.path} has its own exits after layers "
            f"{list(saved.exits['layers'])}: leave exits.layers out, or take its base model"
        )
    _check_positions(cfg, getattr(config, "max_position_embeddings", None))
    return int(config.num_hidden_layers)


def _check_positions(cfg: DictConfig, positions: int | None) -> None:
    _whole(cfg, "data.max_tokens", least=1)
    if positions is not None and cfg.data.max_tokens > positions:
        raise DeliberateError(
            f"data.max_tokens={cfg.data.max_tokens} is more than the model's {positions} positions"
        )


def _check_recipe(cfg: DictConfig, exits: ExitConfig) -> None:
    known = set(inspect.signature(OBJECTIVES[cfg.recipe.name]).parameters) - {"model"}
    for name in cfg.recipe:
        if name != "name" and name not in known:
            raise DeliberateError(
                f"unknown setting recipe.{name}; recipe {cfg.recipe.name!r} has "
                f"{', '.join(sorted(known))}"
            )
    for name in ("kl_weight", "ce_weight", "gate_weight", "early_scale"):
        if name in cfg.recipe:
            _number(cfg, f"recipe.{name}", "at least 0", lambda value: value >= 0)
    if cfg.recipe.name == "heads":
        _number(cfg, "recipe.temperature", "above 0", lambda value: value > 0)
    else:
        _number(cfg, "recipe.layer_dropout", "within [0, 1)", lambda value: 0 <= value < 1)
        layers = cfg.model.layers
        exit_loss_weights(
            exits.layers, layers, scale=cfg.recipe.scale, early_scale=cfg.recipe.early_scale
        )
        layer_dropout_rates(layers, cfg.recipe.layer_dropout)


def _check_data(cfg: DictConfig) -> None:
    weights = cfg.data.weights
    for name in weights:
        _number(cfg, f"data.weights[{name}]", "at least 0", lambda v: v >= 0, value=weights[name])
    chosen = [str(name) for name in weights if weights[name] > 0]
    if not chosen:
        raise DeliberateError("data.weights has no source above 0: give one, e.g. data=words")
    check_training_sources(
        f"reasoning_gym/{name[len(GYM) :]}" if name.startswith(GYM) else name for name in chosen
    )
    _whole(cfg, "data.gym_size", least=1)
    if "{question}" not in cfg.data.prompt:
        raise DeliberateError(f"data.prompt={cfg.data.prompt!r} must contain {{question}}")
    try:
        cfg.data.prompt.format(question="?")
    except (KeyError, IndexError, ValueError):
        raise DeliberateError(
            f"data.prompt={cfg.data.prompt!r}: {{question}} is the only field; write {{{{ for {{"
        ) from None
    for name in chosen:
        if name.startswith(GYM):
            load_reasoning_gym(name[len(GYM) :], size=1, seed=0)
        elif name != WORDS and name not in SOURCES:
            raise DeliberateError(
                f"unknown data source {name!r} in data.weights: one of {WORDS}, "
                f"{', '.join(SOURCES)}, or {GYM}NAME of a reasoning-gym data set"
            )
        elif name != WORDS and cfg.data.hub.get(name) is None:
            load_problems(name, "train", data_dir=cfg.data.dir, limit=1)


def _whole(cfg: DictConfig, key: str, *, least: int, most: int | None = None) -> None:
    value = OmegaConf.select(cfg, key)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"within {least}..{most}"
        raise DeliberateError(f"{key}={value} must be a whole number {limit}")


def _number(
    cfg: DictConfig, key: str, wanted: str, fits: Callable[[float], bool], value: Any = None
) -> None:
    value = OmegaConf.select(cfg, key) if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not fits(value):
        raise DeliberateError(f"{key}={value} must be a number {wanted}")


def _choice(cfg: DictConfig, key: str, choices: Any) -> None:
    value = OmegaConf.select(cfg, key)
    if value not in list(choices):
        names = ", ".join(str(choice).lower() for choice in choices)
        raise DeliberateError(f"{key}={value!r} is unknown; it is one of {names}")
