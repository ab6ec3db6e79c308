"""`deliberate train`: a Hydra application around `AdaptiveTrainer`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from deliberate.kernels.backends import describe
from deliberate.train import dry_run, setup, sweep
from deliberate.train.checkpoints import newest_intact, writing
from deliberate.train.checks import check_config, check_output
from deliberate.train.distributed.sharding import wants_sharding
from deliberate.train.distributed.workers import (
    is_worker,
    launched_here,
    run_workers,
    work_and_exit,
)
from deliberate.train.draft import recipe as draft_recipe
from deliberate.train.held_out import held_out_log
from deliberate.train.interrupt import StopOnInterrupt
from deliberate.train.logs import ConsoleLog, CsvLog, logging_to, variables
from deliberate.train.overrides import first_job, is_sweep, replace_whole_settings, swept_keys
from deliberate.train.resume import check_steps_left, report_resuming
from deliberate.train.trainer import AdaptiveTrainer, training_arguments
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.devices import bf16_line
from deliberate.utils.errors import DeliberateError
from deliberate.utils.file_lock import check_unlocked, locked_folder
from deliberate.utils.files import write_text
from deliberate.utils.hydra_config import CONFIGURATION_ERRORS, compose, one_line, with_experiment
from deliberate.utils.training_record import RECORD_NAME


def train(cfg: DictConfig) -> dict[str, Any]:
    """Runs one training run in this process; returns the record that `run.json` holds.

    Writes into ``output_dir/``: ``config.yaml`` (resolved), ``checkpoint-N/`` (the last two, each a
    loadable model), ``metrics.csv``, ``model/`` (the result, base model included) and ``run.json``.
    Of several workers, all but the first return an empty record; so does a dry run, which prints
    a batch and writes nothing.

    Raises:
        DeliberateError: the configuration cannot work; nothing has been written then.
    """
    check_config(cfg)
    folder = check_output(cfg)
    if cfg.dry_run:
        problems, _, tokenizer = _prepared(cfg, folder, None)
        dry_run.show(setup.build_batches(cfg, tokenizer, problems), tokenizer)
        return {}
    # The process that started workers holds the lock, and its workers inherit it.
    alone = _first() and not launched_here()
    with writing(folder, "the run"), locked_folder(folder) if alone else nullcontext():
        return _train(cfg, folder)


def _prepared(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> tuple[Any, Any, Any]:
    """Builds the training problems, the model and its tokenizer."""
    set_seed(cfg.seed)
    problems = setup.training_problems(cfg)
    model, tokenizer = setup.build_model(cfg, problems, tokenizer_from=checkpoint)
    setup.note_answer_mark(cfg, model)
    setup.add_own_text(cfg, problems, model, tokenizer, folder)
    return problems, model, tokenizer


def _first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    first = _first()
    checkpoint = newest_intact(folder, verbose=first) if cfg.resume else None
    check_steps_left(cfg, checkpoint)
    problems, model, tokenizer = _prepared(cfg, folder, checkpoint)
    batches = setup.build_batches(cfg, tokenizer, problems)
    objective = setup.build_objective(cfg, model)
    objective.prepare(batches.fixed_tokens())
    if cfg.resume and first:
        report_resuming(cfg, folder, checkpoint)
    if first:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    trainable, total = model.trainable_parameters()
    if first:
        print(f"trainable parameters: {trainable:,} of {total:,}", flush=True)
        print(bf16_line(cfg.trainer.bf16), flush=True)

    began = time.time()
    held_out = held_out_log(cfg, folder, objective)
    interrupt = StopOnInterrupt(may_abandon=_saves_alone(cfg), prints=first)
    console = ConsoleLog(batches.step_tokens)
    with logging_to(cfg, folder, first=first) as loggers, interrupt, console:
        trainer = AdaptiveTrainer(
            objective,
            training_arguments(
                folder, cfg.trainer, seed=cfg.seed, report_to=loggers, run_name=folder.name
            ),
            batches,
            optimizer=cfg.trainer.optimizer,
            processing_class=tokenizer,
            callbacks=[interrupt, CsvLog(folder), *held_out, console],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train_from(checkpoint)
        model = trainer.finish(folder)
    if not trainer.is_world_process_zero():
        return {}

    steps, final, shares = trainer.state.global_step, folder / "model", None
    if interrupt.interrupted and not steps:
        print("stopped before the first step was done: nothing is saved", flush=True)
        return {"interrupted": True}
    model.eval()
    if interrupt.interrupted:
        # Thresholds are chosen when the run is complete, by the run that resumes this one.
        print(f"stopped after step {steps} of {cfg.trainer.max_steps}: the same command with "
              "resume=true resumes it", flush=True)  # fmt: skip
    elif cfg.trainer.target_agreement is not None:
        shares = setup.set_thresholds(cfg, model, tokenizer, problems)
    model.save_pretrained(final, merge=True)
    tokenizer.save_pretrained(final)
    record = {
        "command": shlex.join(["deliberate", "train", *_overrides()]),
        "overrides": _overrides(),
        "recipe": cfg.recipe.name,
        "seed": cfg.seed,
        "steps": steps,
        "max_steps": cfg.trainer.max_steps,
        "interrupted": interrupt.interrupted,
        "seconds": round(time.time() - began, 1),
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "thresholds": model.exit_config.to_dict()["thresholds"],
        # Share of tokens that exits at each exit, on the tokens that the thresholds were chosen on;
        # null where none were chosen.
        "exit_shares": shares,
        "parameters": {"trainable": trainable, "total": total},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": describe(),
        "history": trainer.state.log_history,
        # Losses on trainer.held_out, by step.
        "held_out": [asdict(one) for log in held_out for one in log.history],
    }
    write_text(folder / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    print(f"model: {final}", flush=True)
    return record


def _saves_alone(cfg: DictConfig) -> bool:
    """Whether this process can save a checkpoint in the middle of a step, without the others.

    Under torchrun it cannot: torchrun takes the first process that ends for a failure.
    """
    several = is_worker() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not several:
        return True
    return _first() and launched_here() and not wants_sharding(cfg.trainer.fsdp)


def main(arguments: Sequence[str]) -> None:
    """Runs `deliberate train` with Hydra's command line (overrides, --multirun, --cfg job, ...).

    Raises:
        DeliberateError: a mistake in the configuration. For a single run it is found before Hydra
            makes the output folder.
    """
    disable_progress_bar()  # of loading and saving weights: they tear the log lines apart
    arguments = replace_whole_settings(with_experiment(arguments))
    folder = None
    if is_worker():
        # One process describes the run; several would write the same files at the same time.
        arguments = [*arguments, "hydra.output_subdir=null"]
    elif is_sweep(arguments):
        cfg = compose("train", first_job(arguments))
        if draft_recipe.is_draft(cfg):
            raise DeliberateError("recipe=draft is one run: give each output_dir a command")
        folder = Path(cfg.output_dir)
        with writing(folder, "the sweep"), locked_folder(folder):
            if not cfg.dry_run:
                sweep.begin(folder, arguments, cfg.resume)
            jobs = sweep.Jobs(swept_keys(arguments))
            # Hydra's own record would replace the one of the sweep that is resumed.
            _run_hydra([*arguments, "hydra.output_subdir=null"], jobs)
            jobs.check(folder)
        return
    elif not any(argument.startswith("-") for argument in arguments):
        cfg = compose("train", arguments)
        if draft_recipe.is_draft(cfg):
            with writing(Path(cfg.output_dir), "the run"):
                draft_recipe.run(cfg, arguments)
            return
        check_config(cfg)
        if cfg.dry_run:  # outside Hydra, which would make a folder
            train(cfg)
            return
        folder = Path(cfg.output_dir)
        check_unlocked(folder)
    with writing(folder, "the run") if folder is not None else nullcontext():
        others = sweep.Jobs()  # of a sweep with further options, as --multirun --config-dir
        _run_hydra(arguments, others)
        others.check(Path("output_dir"))


def _run_hydra(arguments: Sequence[str], jobs: sweep.Jobs) -> None:
    """Runs Hydra's application: one run, or the jobs of a sweep through `jobs`."""

    def task(cfg: DictConfig) -> None:
        own = sys.argv[1:]
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            _run(cfg, own)
            return
        cfg.output_dir = HydraConfig.get().runtime.output_dir
        own = [*_overrides(), _quoted("output_dir", cfg.output_dir)]
        jobs.swept |= frozenset(HydraConfig.get().sweeper.params or ())  # an experiment's
        if jobs.run(cfg, _overrides(), lambda: _run(cfg, own)):
            raise KeyboardInterrupt  # Ctrl-C ends the jobs after this one too

    application = hydra.main(
        version_base="1.3", config_path="pkg://deliberate.configs", config_name="train"
    )(task)
    # Hydra then raises what went wrong instead of printing a part of the traceback and exiting.
    with variables({"HYDRA_FULL_ERROR": "1"}), _command_line(["deliberate train", *arguments]):
        try:
            application()
        except CONFIGURATION_ERRORS as error:
            raise DeliberateError(one_line(error, "train", arguments)) from None


def _run(cfg: DictConfig, arguments: Sequence[str]) -> bool:
    """Runs one run, by several workers if configured; returns whether it was interrupted."""
    if is_worker():
        work_and_exit(lambda: train(cfg))
    if cfg.trainer.processes == 1 or cfg.dry_run:
        return bool(train(cfg).get("interrupted", False))
    check_config(cfg)
    folder = check_output(cfg)
    with writing(folder, "the run"), locked_folder(folder) as lock:
        return run_workers(cfg.trainer.processes, arguments, keeps=[lock])


def _overrides() -> list[str]:
    """The overrides of the Hydra job that runs, if one does."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _quoted(key: str, value: str) -> str:
    """A Hydra override that gives `key` this text, whatever is in it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Sets the command line that Hydra reads, until the block ends."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":  # torchrun starts `-m deliberate.train.app`
    with one_line_errors():
        main(sys.argv[1:])
