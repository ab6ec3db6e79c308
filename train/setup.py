"""Builds what a training run needs from its configuration, checking it before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from deliberate import storage
from deliberate.config import ExitConfig
from deliberate.errors import DeliberateError
from deliberate.model import AdaptiveModel
from deliberate.train.batches import Encoder, MixtureBatches, prompt_text
from deliberate.train.objectives import HeadsObjective, Objective, PretrainObjective
from deliberate.train.problem import Problem
from deliberate.train.sources import check_training_sources, load_problems, load_reasoning_gym
from deliberate.train.tokenizer import train_tokenizer
from deliberate.train.words import split_of, word_problems

GYM = "gym/"
# Far above any seed that an evaluation uses: reasoning-gym draws item i from seed + i.
TRAIN_GYM_SEED = 10_000_000
_OBJECTIVES: Mapping[str, type[Objective]] = {
    "pretrain": PretrainObjective,
    "heads": HeadsObjective,
}


def check_config(cfg: DictConfig) -> None:
    """Raises a one-line error for what cannot work, before anything is loaded or written."""
    if cfg.recipe.name not in _OBJECTIVES:
        raise DeliberateError(
            f"recipe {cfg.recipe.name!r} is unknown; it is one of {', '.join(_OBJECTIVES)}"
        )
    if cfg.recipe.name == "pretrain" and cfg.model.kind != "scratch":
        raise DeliberateError(
            f"recipe 'pretrain' trains from scratch but model.kind is {cfg.model.kind!r}: "
            "use model=scratch, or recipe=heads"
        )
    if cfg.recipe.name == "heads" and cfg.model.kind == "scratch":
        raise DeliberateError("recipe 'heads' needs a trained model: give model=folder model.path=...")
    if cfg.trainer.micro_batches % cfg.trainer.processes:
        raise DeliberateError(
            f"trainer.micro_batches={cfg.trainer.micro_batches} must be a multiple of "
            f"trainer.processes={cfg.trainer.processes}"
        )
    for name in ("max_steps", "tokens_per_step", "micro_batches", "log_every", "save_every"):
        value = cfg.trainer[name]
        if not isinstance(value, int) or value < 1:
            raise DeliberateError(f"trainer.{name}={value} must be a whole number of at least 1")
    if cfg.model.kind == "scratch":
        heads, width = cfg.model.heads, cfg.model.hidden_size
        if width % heads or (width // heads) % 2:
            raise DeliberateError(
                f"model.hidden_size={width} must split into {heads} heads of even width"
            )
        _exit_config(cfg, cfg.model.layers)
    names = [name for name, weight in cfg.data.weights.items() if weight]
    check_training_sources(
        [f"reasoning_gym/{n[len(GYM) :]}" if n.startswith(GYM) else n for n in names]
    )


def _exit_config(cfg: DictConfig, num_layers: int) -> ExitConfig:
    settings: Any = OmegaConf.to_container(cfg.exits, resolve=True)
    layers, thresholds = settings.pop("layers"), settings.pop("thresholds")
    return ExitConfig.build(num_layers, layers, thresholds, **settings)


def training_problems(cfg: DictConfig) -> dict[str, list[Problem]]:
    """The fixed training problems by source; the grammar is drawn while training."""
    problems: dict[str, list[Problem]] = {}
    for name, weight in cfg.data.weights.items():
        if not weight or name == "words":
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
    every = [*word_problems("train", size=6000, seed=-1)]
    for group in problems.values():
        every.extend(islice(group, 8000))
    for problem in every:
        yield f"{prompt_text(problem.question, template)} {problem.solution or problem.answer}"


def build_model(
    cfg: DictConfig, problems: Mapping[str, Sequence[Problem]]
) -> tuple[AdaptiveModel, Any]:
    """The adaptive model to train and its tokenizer."""
    if cfg.model.kind == "scratch":
        tokenizer = train_tokenizer(
            _tokenizer_texts(problems, cfg.data.prompt), cfg.model.vocab_size
        )
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
        base = LlamaForCausalLM(config)
        return AdaptiveModel(base, _exit_config(cfg, cfg.model.layers)), tokenizer
    source = storage.resolve(cfg.model.path)
    tokenizer = storage.load_tokenizer(source)
    saved = storage.read_adaptive_config(source)
    if saved is not None:
        return AdaptiveModel.from_pretrained(source), tokenizer
    base = storage.load_base(source)
    return AdaptiveModel(base, _exit_config(cfg, base.config.num_hidden_layers)), tokenizer


def build_objective(cfg: DictConfig, model: AdaptiveModel) -> Objective:
    """The recipe's objective around the model."""
    model.base.set_attn_implementation(cfg.trainer.attention)
    settings: Any = OmegaConf.to_container(cfg.recipe, resolve=True)
    return _OBJECTIVES[settings.pop("name")](model, **settings)


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


def output_folder(cfg: DictConfig) -> Path:
    """Where the run writes; it must be new, empty, or resumed."""
    folder = Path(cfg.output_dir)
    if not cfg.resume and any(folder.glob("checkpoint-*")):
        raise DeliberateError(
            f"output_dir={folder} already holds checkpoints: add resume=true, or choose another"
        )
    return folder
