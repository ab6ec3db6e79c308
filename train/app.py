"""`deliberate train`: a Hydra application around `AdaptiveTrainer`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from deliberate import storage
from deliberate.configuration import CONFIGURATION_ERRORS, compose, one_line
from deliberate.environment import describe
from deliberate.errors import DeliberateError
from deliberate.train import dry_run, setup
from deliberate.train.checks import check_config, check_output
from deliberate.train.logs import ConsoleLog, CsvLog, logging_to, variables
from deliberate.train.resume import report_resuming
from deliberate.train.trainer import (
    AdaptiveTrainer,
    StopOnInterrupt,
    newest_checkpoint,
    training_arguments,
)
from deliberate.train.workers import is_worker, run_workers, work_and_leave


def train(cfg: DictConfig) -> dict[str, Any]:
    """One training run in this process; returns the record that `run.json` holds.

    Writes ``output_dir/``: ``config.yaml`` (resolved), ``checkpoint-N/`` (the last two, each a
    loadable model), ``metrics.csv``, ``model/`` (the result, base model included) and ``run.json``.
    As one of several workers, all but the first return an empty record; so does a dry run, which
    prints a batch and writes nothing.

    Raises:
        DeliberateError: the configuration cannot work; nothing has been written then.
    """
    check_config(cfg)
    folder = check_output(cfg)
    checkpoint = newest_checkpoint(folder) if cfg.resume else None
    set_seed(cfg.seed)
    problems = setup.training_problems(cfg)
    model, tokenizer = setup.build_model(cfg, problems, tokenizer_from=checkpoint)
    setup.add_own_text(cfg, problems, model, tokenizer, folder)
    batches = setup.build_batches(cfg, tokenizer, problems)
    if cfg.dry_run:
        dry_run.show(batches, tokenizer)
        return {}
    objective = setup.build_objective(cfg, model)
    first = int(os.environ.get("RANK", 0)) == 0
    if cfg.resume and first:
        report_resuming(cfg, folder, checkpoint)
    if first:
        storage.write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    trainable, total = model.trainable_parameters()
    if first:
        print(f"trainable parameters: {trainable:,} of {total:,}", flush=True)

    began = time.time()
    with logging_to(cfg, folder) as loggers, StopOnInterrupt() as interrupt:
        trainer = AdaptiveTrainer(
            objective,
            training_arguments(
                folder, cfg.trainer, seed=cfg.seed, report_to=loggers, run_name=folder.name
            ),
            batches,
            optimizer=cfg.trainer.optimizer,
            processing_class=tokenizer,
            callbacks=[interrupt, CsvLog(folder), ConsoleLog()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        model = trainer.finish(folder)
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
        "overrides": _overrides(),
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
    disable_progress_bar()  # of loading and saving weights: they tear the log lines apart
    if is_worker():
        # One process describes the run; several would write the same files at the same time.
        arguments = [*arguments, "hydra.output_subdir=null"]
    elif not any(argument.startswith("-") for argument in arguments):
        cfg = compose("train", arguments)
        check_config(cfg)
        if cfg.dry_run:  # outside Hydra, which would make a folder
            train(cfg)
            return
    # Hydra then raises what went wrong instead of printing a part of the traceback and exiting.
    with variables({"HYDRA_FULL_ERROR": "1"}), _command_line(["deliberate train", *arguments]):
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
    if cfg.trainer.processes > 1 and not cfg.dry_run:
        check_config(cfg)
        interrupted = run_workers(cfg.trainer.processes, arguments)
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


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """What Hydra reads as this program's command line, for the time of a block."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    # torchrun starts `-m deliberate.train.app`; the command's entry prints mistakes as one line.
    from deliberate.cli import main as command

    command(["train", *sys.argv[1:]])
