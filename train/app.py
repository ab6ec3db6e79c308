"""`deliberate train`: a Hydra application around `AdaptiveTrainer`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from deliberate import storage
from deliberate.configuration import CONFIGURATION_ERRORS, compose, one_line
from deliberate.environment import describe
from deliberate.errors import DeliberateError
from deliberate.train import setup
from deliberate.train.checks import check_config, check_output
from deliberate.train.trainer import (
    AdaptiveTrainer,
    StopOnInterrupt,
    newest_checkpoint,
    training_arguments,
)
from deliberate.train.workers import is_worker, run_workers, work_and_leave

# Settings that may change between a run and its continuation without changing the weights.
_FREE_TO_CHANGE = ("output_dir", "resume", "logger", "debug", "trainer.log_every",
                   "trainer.save_every", "data.dir")  # fmt: skip


def train(cfg: DictConfig) -> dict[str, Any]:
    """One training run in this process; returns the record that `run.json` holds.

    Writes ``output_dir/``: ``config.yaml`` (resolved), ``checkpoint-N/`` (the last two, each a
    loadable model), ``model/`` (the result, base model included) and ``run.json``. As one of
    several workers, all but the first return an empty record.

    Raises:
        DeliberateError: the configuration cannot work; nothing has been written then.
    """
    check_config(cfg)
    folder = check_output(cfg)
    checkpoint = newest_checkpoint(folder) if cfg.resume else None
    set_seed(cfg.seed)
    problems = setup.training_problems(cfg)
    model, tokenizer = setup.build_model(cfg, problems, tokenizer_from=checkpoint)
    objective = setup.build_objective(cfg, model)
    batches = setup.build_batches(cfg, tokenizer, problems)
    if cfg.resume:
        _report_resuming(cfg, folder, checkpoint)
    storage.write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    trainable, total = model.trainable_parameters()
    print(f"trainable parameters: {trainable:,} of {total:,}", flush=True)

    began = time.time()
    with _logging_to(cfg, folder) as loggers, StopOnInterrupt() as interrupt:
        trainer = AdaptiveTrainer(
            objective,
            training_arguments(
                folder, cfg.trainer, seed=cfg.seed, report_to=loggers, run_name=folder.name
            ),
            batches,
            optimizer=cfg.trainer.optimizer,
            processing_class=tokenizer,
            callbacks=[interrupt],
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not trainer.is_world_process_zero():
        return {}

    final = folder / "model"
    model.eval()
    if cfg.trainer.target_agreement is not None:
        setup.set_thresholds(cfg, model, tokenizer, problems)
    model.save_pretrained(final, merge=True)
    tokenizer.save_pretrained(final)
    record = {
        "command": shlex.join(["deliberate", "train", *_overrides()]),
        "recipe": cfg.recipe.name,
        "seed": cfg.seed,
        "steps": trainer.state.global_step,
        "max_steps": cfg.trainer.max_steps,
        "interrupted": interrupt.interrupted,
        "seconds": round(time.time() - began, 1),
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "thresholds": list(model.exit_config.thresholds),
        "parameters": {"trainable": trainable, "total": total},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": describe(),
        "history": trainer.state.log_history,
    }
    storage.write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    print(f"model: {final}", flush=True)
    return record


def main(arguments: Sequence[str]) -> None:
    """Runs `deliberate train` with Hydra's command line (overrides, --multirun, --cfg job, ...).

    Raises:
        DeliberateError: a mistake in the configuration. For a single run it is found before Hydra
            makes the output folder.
    """
    if not any(argument.startswith("-") for argument in arguments) and not is_worker():
        check_config(compose("train", arguments))
    # Hydra then raises what went wrong instead of printing a part of the traceback and exiting.
    with _variables({"HYDRA_FULL_ERROR": "1"}), _command_line(["deliberate train", *arguments]):
        try:
            _hydra_main()
        except CONFIGURATION_ERRORS as error:
            raise DeliberateError(one_line(error, "train", arguments)) from None


@hydra.main(version_base="1.3", config_path="pkg://deliberate.configs", config_name="train")
def _hydra_main(cfg: DictConfig) -> None:
    arguments = sys.argv[1:]
    several_jobs = HydraConfig.get().mode == RunMode.MULTIRUN
    if several_jobs:
        cfg.output_dir = HydraConfig.get().runtime.output_dir
        arguments = [*_overrides(), _quoted("output_dir", cfg.output_dir)]
    if is_worker():
        work_and_leave(lambda: train(cfg))
    if cfg.trainer.processes > 1:
        check_config(cfg)
        interrupted = run_workers(cfg.trainer.processes, [*arguments, "hydra.output_subdir=null"])
    else:
        interrupted = train(cfg).get("interrupted", False)
    if interrupted and several_jobs:
        raise KeyboardInterrupt  # it meant the jobs after this one too


def _overrides() -> list[str]:
    """The overrides of the Hydra job that runs, if one does."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _quoted(key: str, value: str) -> str:
    """A Hydra override that gives `key` this text, whatever is in it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _report_resuming(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> None:
    """Says where the run goes on, and which settings keep it from being the same run."""
    if checkpoint is None:
        print(f"resume: no checkpoint in {folder} yet, starting anew", flush=True)
        return
    print(f"resume: from {checkpoint}", flush=True)
    if not (folder / "config.yaml").is_file():
        return
    before = OmegaConf.load(folder / "config.yaml")
    for key in _keys(cfg):
        was, now = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE_TO_CHANGE)
        if was != now and not free:
            print(f"resume: {key} was {was} and is {now}: not the same run any more", flush=True)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, DictConfig):
            yield from _keys(value, prefix + str(name) + ".")
        else:
            yield prefix + str(name)


@contextmanager
def _logging_to(cfg: DictConfig, folder: Path) -> Iterator[list[str]]:
    """Trainer's names of the configured loggers, set up for this run and ended with it."""
    if cfg.logger.name != "wandb":
        yield []
        return
    settings = {
        "WANDB_MODE": cfg.logger.mode,
        "WANDB_PROJECT": cfg.logger.project,
        "WANDB_DIR": str(folder),
    }
    # What the user's environment says goes before the configuration.
    with _variables({name: os.environ.get(name, value) for name, value in settings.items()}):
        import wandb

        try:
            yield ["wandb"]
        finally:
            wandb.finish()


@contextmanager
def _variables(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """What Hydra reads as this program's command line, for the time of a block."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before
