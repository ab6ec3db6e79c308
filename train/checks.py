"""Checks of a training configuration before anything is written; every error is one line.

Only little is read: a model's `config.json`, the first row of each data set.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from deliberate.api import checkpoint
from deliberate.api.gguf import is_gguf, load_gguf_config
from deliberate.data.chains import CHAINS
from deliberate.data.prompts import LOSS_ON, has_chat_template
from deliberate.data.questions import question_sources
from deliberate.data.self_generated import SELF, SelfDataConfig
from deliberate.data.sources import (
    SOURCES,
    check_training_sources,
    load_problems,
    load_reasoning_gym,
)
from deliberate.data.texts import is_text, load_file, load_texts
from deliberate.executors.rounded_layers import ROW_GRIDS
from deliberate.installation import install_extra
from deliberate.modeling.architectures import refuse_recurrent
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.pruning import check_kept
from deliberate.train.curricula import active_exits, dropout_scale
from deliberate.train.distributed.sharding import wants_sharding
from deliberate.train.distributed.workers import is_worker
from deliberate.train.held_out import check_held_out
from deliberate.train.losses import exit_loss_weights, layer_dropout_rates
from deliberate.train.optim import OPTIMIZERS
from deliberate.train.recipes import find_recipe
from deliberate.train.resume import CHANGED, check_same_run
from deliberate.train.setting_checks import check_choice, check_number, check_whole
from deliberate.utils.errors import DeliberateError

WORDS = "words"
GYM = "gym/"
MODEL_KINDS = ("scratch", "folder")
_BYTES_AND_SPECIALS = 256 + 3


def check_config(cfg: DictConfig) -> None:
    """Raises a one-line error for a configuration that cannot work, before any work starts.

    Raises:
        DeliberateError: names the key, its value and what would be right.
    """
    check_whole(cfg, "seed", least=0, most=2**32 - 1)
    find_recipe(cfg.recipe.name)
    check_choice(cfg, "model.kind", MODEL_KINDS)
    check_choice(cfg, "resume", (True, False, CHANGED))
    check_choice(cfg, "dry_run", (True, False))
    _check_start(cfg)
    _check_trainer(cfg)
    _check_logger(cfg)
    num_layers = _check_scratch(cfg) if cfg.model.kind == "scratch" else _check_folder(cfg)
    _check_recipe(cfg, exit_config(cfg, num_layers), num_layers)
    _check_tokenizer(cfg)
    folder = check_output(cfg)
    if cfg.resume:
        check_same_run(cfg, folder)
    _check_data(cfg)
    check_held_out(cfg)


def _check_start(cfg: DictConfig) -> None:
    name, kind = cfg.recipe.name, cfg.model.kind
    recipe = find_recipe(name)
    if kind == "scratch" and not recipe.from_scratch:
        raise DeliberateError(
            f"recipe {name!r} needs a trained model: give model=folder model.path=..."
        )
    if kind == "folder" and not recipe.from_checkpoint:
        raise DeliberateError(
            f"recipe {name!r} trains from scratch but model.kind is {kind!r}: use model=scratch, "
            "or recipe=layerskip"
        )


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
    """The folder that the run writes to: new, without checkpoints, or one to resume."""
    folder = Path(cfg.output_dir)
    if folder.exists() and not folder.is_dir():
        raise DeliberateError(f"output_dir={folder} is a file: give a folder")
    if not cfg.resume and not cfg.dry_run and any(folder.glob("checkpoint-*")):
        raise DeliberateError(
            f"output_dir={folder} already holds checkpoints: add resume=true, or choose another"
        )
    return folder


def _check_trainer(cfg: DictConfig) -> None:
    for name in ("max_steps", "tokens_per_step", "micro_batches", "processes"):
        check_whole(cfg, f"trainer.{name}", least=1)
    for name in ("log_every", "save_every"):
        check_whole(cfg, f"trainer.{name}", least=1)
    check_whole(cfg, "trainer.warmup_steps", least=0)
    launched = int(os.environ.get("WORLD_SIZE", 1)) if is_worker() else cfg.trainer.processes
    if cfg.trainer.processes not in (1, launched):
        raise DeliberateError(
            f"trainer.processes={cfg.trainer.processes} but {launched} were launched: leave it out"
        )
    if cfg.trainer.micro_batches % launched:
        raise DeliberateError(
            f"trainer.micro_batches={cfg.trainer.micro_batches} must be a multiple of "
            f"trainer.processes={launched}"
        )
    for name in ("fsdp", "gradient_checkpointing"):
        check_choice(cfg, f"trainer.{name}", (True, False))
    if wants_sharding(cfg.trainer.fsdp):
        if launched == 1:
            raise DeliberateError("trainer.fsdp=true shards over processes: trainer.processes=2")
        if cfg.trainer.optimizer == "muon":
            raise DeliberateError(
                "trainer.fsdp=true cannot use trainer.optimizer=muon, which needs whole matrices: "
                "take trainer.optimizer=adamw"
            )
    check_number(cfg, "trainer.learning_rate", "above 0", lambda value: value > 0)
    for name in ("weight_decay", "max_grad_norm"):
        check_number(cfg, f"trainer.{name}", "at least 0", lambda value: value >= 0)
    for name in ("decay_share", "curriculum"):
        check_number(cfg, f"trainer.{name}", "within [0, 1]", lambda value: 0 <= value <= 1)
    check_choice(cfg, "trainer.optimizer", OPTIMIZERS)
    check_choice(cfg, "trainer.attention", ("eager", "sdpa"))
    check_choice(cfg, "trainer.bf16", ("auto", True, False))


def _check_logger(cfg: DictConfig) -> None:
    check_choice(cfg, "logger.name", ("none", "wandb"))
    if cfg.logger.name == "wandb":
        check_choice(cfg, "logger.mode", ("offline", "online", "disabled"))
        if importlib.util.find_spec("wandb") is None:
            raise DeliberateError(
                f"logger=wandb needs the package `wandb`: {install_extra('wandb')}"
            )


def _check_scratch(cfg: DictConfig) -> int:
    """Checks the shape of a new model; its number of layers."""
    for name in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads"):
        check_whole(cfg, f"model.{name}", least=1)
    check_whole(cfg, "model.vocab_size", least=_BYTES_AND_SPECIALS)
    check_whole(cfg, "model.max_positions", least=1)
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
    saved = checkpoint.read_adaptive_config(checkpoint.resolve(cfg.model.path))
    config = _model_config(cfg)
    refuse_recurrent(config)
    _check_fit_tokens(cfg)
    kept = cfg.model.get("keep_layers")
    if kept is not None:
        check_kept(
            OmegaConf.to_container(kept) if OmegaConf.is_config(kept) else kept,
            int(config.num_hidden_layers),
            cfg.model.path,
        )
    wanted = cfg.exits.layers
    if (
        kept is None
        and saved is not None
        and wanted != "auto"
        and list(wanted) != list(saved.exits["layers"])
    ):
        raise DeliberateError(
            f"exits.layers={list(wanted)} but {cfg.model.path} has its own exits after layers "
            f"{list(saved.exits['layers'])}: leave exits.layers out, or take its base model"
        )
    _check_positions(cfg, getattr(config, "max_position_embeddings", None))
    return int(config.num_hidden_layers) if kept is None else len(kept)


def _check_fit_tokens(cfg: DictConfig) -> None:
    """A student alone is fitted, on text that there is before training."""
    tokens = cfg.model.get("fit_tokens")
    if tokens is None:
        return
    check_whole(cfg, "model.fit_tokens", least=1)
    grid = cfg.recipe.get("weights")
    if cfg.model.get("keep_layers") is None and grid not in ROW_GRIDS:
        raise DeliberateError(
            f"model.fit_tokens={tokens} fits a student of fewer layers: give model.keep_layers "
            f"too; or, with recipe=qat, rounds to recipe.weights={' or '.join(ROW_GRIDS)}"
        )
    if cfg.data.weights.get(SELF):
        raise DeliberateError(
            f"model.fit_tokens={tokens}: data source {SELF!r} is written by the model in training, "
            "after it is fitted; take other data"
        )


def _check_tokenizer(cfg: DictConfig) -> None:
    """Checks that its ids fit the model, that a teacher has the same, and a chat template."""
    teacher = cfg.recipe.get("teacher")
    own = None
    if cfg.model.kind == "folder":
        source = cfg.model.get("tokenizer") or cfg.model.path
        own = checkpoint.load_tokenizer(source)
        highest, rows = max(own.get_vocab().values()), _model_config(cfg).vocab_size
        if highest >= rows:
            raise DeliberateError(
                f"the tokenizer of {source} does not fit: it has a token {highest}, the model "
                f"{rows} rows of embeddings; give the model's own"
            )
    if teacher is not None:
        theirs = checkpoint.load_tokenizer(teacher)
        if own is not None and own.get_vocab() != theirs.get_vocab():
            raise DeliberateError(
                f"recipe.teacher={teacher} has another tokenizer than {cfg.model.path}: a teacher "
                "of another size must have the same tokens"
            )
        own = own or theirs
    if cfg.data.chat is True and (own is None or not has_chat_template(own)):
        raise DeliberateError("data.chat=true but the tokenizer has no chat template: use false")


def _model_config(cfg: DictConfig) -> Any:
    source = checkpoint.resolve(cfg.model.path)
    saved = checkpoint.read_adaptive_config(source)
    base = source if saved is None else saved.base
    try:
        return load_gguf_config(base) if is_gguf(base) else AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeliberateError(f"model.path={cfg.model.path}: {first}") from None


def _check_positions(cfg: DictConfig, positions: int | None) -> None:
    check_whole(cfg, "data.max_tokens", least=1)
    if positions is not None and cfg.data.max_tokens > positions:
        raise DeliberateError(
            f"data.max_tokens={cfg.data.max_tokens} is more than the model's {positions} positions"
        )


def _check_recipe(cfg: DictConfig, exits: ExitConfig, num_layers: int) -> None:
    recipe = find_recipe(cfg.recipe.name)
    known = set(inspect.signature(recipe.objective).parameters) - {"model"}
    for name in cfg.recipe:
        if name != "name" and name not in known:
            raise DeliberateError(
                f"unknown setting recipe.{name}; recipe {cfg.recipe.name!r} has "
                f"{', '.join(sorted(known))}"
            )
    for name in ("kl_weight", "ce_weight", "gate_weight", "early_scale"):
        if name in cfg.recipe:
            check_number(cfg, f"recipe.{name}", "at least 0", lambda value: value >= 0)
    if "temperature" in cfg.recipe:
        check_number(cfg, "recipe.temperature", "above 0", lambda value: value > 0)
    if "layer_dropout" in cfg.recipe:
        check_number(cfg, "recipe.layer_dropout", "within [0, 1)", lambda value: 0 <= value < 1)
        layer_dropout_rates(num_layers, cfg.recipe.layer_dropout)
    if "scale" in cfg.recipe:
        exit_loss_weights(
            exits.layers, num_layers, scale=cfg.recipe.scale, early_scale=cfg.recipe.early_scale
        )
    _check_curriculum(cfg)
    recipe.check(cfg)


def _check_curriculum(cfg: DictConfig) -> None:
    if "gradual_share" in cfg.recipe:
        check_number(cfg, "recipe.gradual_share", "within [0, 1]", lambda value: 0 <= value <= 1)
    if "curriculum" in cfg.recipe:
        check_whole(cfg, "recipe.rotation", least=1)
        active_exits(cfg.recipe.curriculum, 0, 1, 1)
        dropout_scale(cfg.recipe.dropout_schedule, 0, 1)


def _check_data(cfg: DictConfig) -> None:
    weights = cfg.data.weights
    for name in weights:
        check_number(
            cfg, f"data.weights[{name}]", "at least 0", lambda v: v >= 0, value=weights[name]
        )
    chosen = [str(name) for name in weights if weights[name] > 0]
    if not chosen:
        raise DeliberateError("data.weights has no source above 0: give one, e.g. data=words")
    check_training_sources(
        f"reasoning_gym/{name[len(GYM) :]}" if name.startswith(GYM) else name for name in chosen
    )
    check_whole(cfg, "data.gym_size", least=1)
    check_choice(cfg, "data.chat", ("auto", True, False))
    check_choice(cfg, "data.packing", (True, False))
    check_choice(cfg, "data.loss_on", LOSS_ON)
    if "{question}" not in cfg.data.prompt:
        raise DeliberateError(f"data.prompt={cfg.data.prompt!r} must contain {{question}}")
    try:
        cfg.data.prompt.format(question="?")
    except (KeyError, IndexError, ValueError):
        raise DeliberateError(
            f"data.prompt={cfg.data.prompt!r}: {{question}} is the only field; write {{{{ for {{"
        ) from None
    for section in ("files", "hub"):
        for name in cfg.data[section] or ():
            if name not in weights:
                raise DeliberateError(
                    f"data.{section}.{name} is read by no source: give data.weights.{name} too "
                    "(+data.weights={" + str(name) + ": 1}), or leave it out"
                )
    for name in chosen:
        _check_source(cfg, name)


def _check_source(cfg: DictConfig, name: str) -> None:
    """Reads the first row of a source."""
    if name in cfg.data.files:
        settings: Any = OmegaConf.to_container(cfg.data.files[name], resolve=True)
        load_file(name, settings, limit=None if settings.get("hub") is None else 1)
    elif name == SELF:
        _check_own_text(cfg)
    elif is_text(name):
        load_texts(name, data_dir=cfg.data.dir, limit=1)
    elif name.startswith(GYM):
        load_reasoning_gym(name[len(GYM) :], size=1, seed=0)
    elif name not in (WORDS, CHAINS, *SOURCES):
        raise DeliberateError(
            f"unknown data source {name!r} in data.weights: one of {WORDS}, {CHAINS}, text, "
            f"{SELF}, {', '.join(SOURCES)}, {GYM}NAME of a reasoning-gym data set, or a name in "
            "data.files"
        )
    elif name in SOURCES and cfg.data.hub.get(name) is None:
        load_problems(name, "train", data_dir=cfg.data.dir, limit=1)


def _check_own_text(cfg: DictConfig) -> None:
    if cfg.model.kind == "scratch":
        raise DeliberateError(
            f"data source {SELF!r} is the model's own text, and a model from scratch has none: "
            "give model=folder model.path=..."
        )
    known = {field.name for field in fields(SelfDataConfig)}
    for name in cfg.data.self:
        if name not in known:
            raise DeliberateError(
                f"unknown setting data.self.{name}; known: {', '.join(sorted(known))}"
            )
    SelfDataConfig(**cfg.data.self)
    question_sources(
        cfg.data.self.questions, chat=cfg.data.chat is not False, data_dir=cfg.data.dir
    )
    positions = getattr(_model_config(cfg), "max_position_embeddings", None)
    if positions is not None and cfg.data.self.max_tokens > positions:
        raise DeliberateError(
            f"data.self.max_tokens={cfg.data.self.max_tokens} is more than the model's "
            f"{positions} positions"
        )
