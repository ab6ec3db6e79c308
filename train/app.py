"""`deliberate train`: a Hydra application around `AdaptiveTrainer`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from deliberate import storage
from deliberate.configuration import compose
from deliberate.environment import describe
from deliberate.errors import DeliberateError
from deliberate.train import setup
from deliberate.train.trainer import (
    AdaptiveTrainer,
    StopOnInterrupt,
    newest_checkpoint,
    training_arguments,
)


def train(cfg: DictConfig) -> dict[str, Any]:
    """One training run; returns the record that `run.json` holds.

    Raises:
        DeliberateError: the configuration cannot work; nothing has been written then.
    """
    setup.check_config(cfg)
    folder = setup.output_folder(cfg)
    set_seed(cfg.seed)
    problems = setup.training_problems(cfg)
    model, tokenizer = setup.build_model(cfg, problems)
    objective = setup.build_objective(cfg, model)
    batches = setup.build_batches(cfg, tokenizer, problems)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    report_to = []
    if cfg.logger.name == "wandb":
        os.environ.setdefault("WANDB_MODE", cfg.logger.mode)
        os.environ.setdefault("WANDB_PROJECT", cfg.logger.project)
        os.environ.setdefault("WANDB_DIR", str(folder))
        report_to = ["wandb"]
    interrupt = StopOnInterrupt()
    trainer = AdaptiveTrainer(
        objective,
        training_arguments(
            folder, cfg.trainer, seed=cfg.seed, report_to=report_to, run_name=folder.name
        ),
        batches,
        optimizer=cfg.trainer.optimizer,
        processing_class=tokenizer,
        callbacks=[interrupt],
    )
    trainable, total = model.trainable_parameters()
    print(f"trainable parameters: {trainable:,} of {total:,}", flush=True)
    checkpoint = newest_checkpoint(folder) if cfg.resume else None
    began = time.time()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    final = folder / "model"
    if not trainer.is_world_process_zero():
        return {}
    model.eval()
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
        "parameters": {"trainable": trainable, "total": total},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": describe(),
        "history": trainer.state.log_history,
    }
    storage.write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    print(f"model: {final}", flush=True)
    return record


def _overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def main(arguments: Sequence[str]) -> None:
    """Runs `deliberate train` with Hydra's command line (overrides, --multirun, --cfg job, ...).

    Composes and checks once before Hydra takes over, so that a mistake is one line and no folder
    has been made.
    """
    overrides = [a for a in arguments if not a.startswith("-")]
    if "--help" not in arguments and "--hydra-help" not in arguments:
        multirun = {"-m", "--multirun"} & set(arguments)
        if not multirun:
            cfg = compose("train", overrides)
            setup.check_config(cfg)
            if cfg.trainer.processes > 1 and "LOCAL_RANK" not in os.environ:
                _launch(cfg.trainer.processes, arguments)
                return
    before, sys.argv = sys.argv, ["deliberate train", *arguments]
    try:
        _hydra_main()
    finally:
        sys.argv = before


def _launch(processes: int, arguments: Sequence[str]) -> None:
    """Runs the same command in `processes` workers on this machine (torchrun, gloo on a CPU).

    Raises:
        DeliberateError: a worker failed.
    """
    # One thread each unless told otherwise: at this size two workers with a thread each train
    # about 1.7 times as fast as one worker with two threads.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "deliberate.cli", "train", *arguments]
    worker = subprocess.Popen(command, env=environment)
    while True:
        try:
            status = worker.wait()
            break
        except KeyboardInterrupt:
            continue  # the workers got it too: they save a checkpoint and end
    if status:
        raise DeliberateError(f"a training worker ended with status {status}: see its output above")


@hydra.main(version_base="1.3", config_path="pkg://deliberate.configs", config_name="train")
def _hydra_main(cfg: DictConfig) -> None:
    torch.set_float32_matmul_precision("highest")
    train(cfg)
