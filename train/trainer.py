"""`transformers.Trainer` for adaptive models: batches by index, figures by exit, and checkpoints
that are written atomically and load as adaptive models."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from deliberate.api.model import AdaptiveModel
from deliberate.train.checkpoints import (
    STAGING_NAME,
    fault,
    remove_old,
    seal,
    writing,
)
from deliberate.train.distributed.sharding import (
    FSDP_ARGUMENTS,
    load_whole_state,
    shard_on_cpus,
    wants_sharding,
)
from deliberate.train.distributed.workers import is_worker
from deliberate.train.interrupt import StepAbandoned, handle_signals_in_backward
from deliberate.train.metrics import calibration_error, expected_speed, head_cost
from deliberate.train.objectives.base import Objective
from deliberate.train.optim import build_optimizer
from deliberate.train.saving import is_sharded, plain_copy, whole_state
from deliberate.utils.devices import use_bf16
from deliberate.utils.errors import DeliberateError

# Tokens of each process on which the calibration error and the expected speed are computed.
MEASURED_TOKENS = 4096
# An exit gate has d weights, the head V * d: its cost is neglected.
_GATE_READ = 0.0
# Raised by reading an optimizer state of another kind or a damaged one.
_UNREADABLE = (ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError)
# Trainer's file of a sharded run's optimizer state; other runs have optimizer.pt.
SHARDED_OPTIMIZER = "optimizer.bin"


class AdaptiveTrainer(Trainer):
    """Trains an `Objective`; item i of the data set is micro-batch i."""

    def __init__(
        self,
        objective: Objective,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        *,
        optimizer: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=objective,
            args=args,
            train_dataset=train_dataset,
            data_collator=_only_item,
            **kwargs,
        )
        self._optimizer_name = optimizer
        self._sums: dict[str, Tensor] = {}
        self._measured: list[Tensor] = []
        self._saving = False

    @property
    def trained_objective(self) -> Objective:
        """The objective in training, without wrappers."""
        objective: Objective = self.accelerator.unwrap_model(self.model)
        return objective

    @property
    def adaptive(self) -> AdaptiveModel:
        """The adaptive model in training."""
        return self.trained_objective.model

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own, and sharding on CPUs, which accelerate does not do."""
        super().create_accelerator_and_postprocess()
        wanted = wants_sharding(self.args.fsdp_plugin_args is not None)
        if wanted and shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_sharded(self.trained_objective) and self.is_world_process_zero():
            print(f"sharded over {self.args.world_size} processes", flush=True)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the configured optimizer once."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None  # given to __init__
            self.optimizer = build_optimizer(
                trained,
                self._optimizer_name,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch; its sums are kept for the next log line."""
        # So that dropout depends on the micro-batch alone: not on the process or earlier draws.
        torch.manual_seed(_seed(self.args.seed, int(inputs.pop("index"))))
        objective, step = self.trained_objective, self.state.global_step
        objective.step, objective.steps = step, self.state.max_steps
        objective.measuring = step == 0 or (step + 1) % int(self.args.logging_steps) == 0
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        for name, value in outputs["sums"].items():
            # Kept as tensors: converting them would synchronise with the device each time.
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if "measured" in outputs:
            self._measured.append(outputs["measured"])
        handle_signals_in_backward(loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means by exit since the last line, over the micro-batches of all processes."""
        if "loss" in logs and self._sums:
            logs |= self._means() | self._measures()
            self._sums, self._measured = {}, []
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        names = sorted(self._sums)
        local = torch.stack([self._sums[name].to(torch.float32) for name in names])
        every = self.accelerator.reduce(local.to(self.args.device), reduction="sum")
        sums = dict(zip(names, every.tolist(), strict=True))
        tokens = sums.pop("tokens")
        counts = {n.partition("/")[2]: sums.pop(n) for n in names if n.startswith("tokens/")}
        means = {}
        for name, value in sums.items():
            count = counts.get(name.partition("/")[2], tokens)
            if count:  # 0 where a curriculum did not train the exit
                means[name] = value / count
        return means | {"target_tokens": tokens}

    def _measures(self) -> dict[str, float]:
        """Calibration error by exit and expected speed, on the tokens of the last step."""
        if not self._measured:
            return {}
        rows = torch.cat(self._measured)[:MEASURED_TOKENS]
        # Every process gathers equally many rows; missing ones are NaN.
        padded = rows.new_full((MEASURED_TOKENS, *rows.shape[1:]), torch.nan)
        padded[: len(rows)] = rows
        gathered = self.accelerator.gather(padded.to(self.args.device)).cpu()
        gathered = gathered[~gathered[:, 0, 0].isnan()]
        confidence, agrees = gathered[..., 0], gathered[..., 1] > 0
        model, backbone = self.adaptive, self.adaptive.backbone
        head = head_cost(backbone.lm_head, backbone.layers)
        by_gate = model.exits.measure.before_head
        result = {
            f"ece/exit{layer}": calibration_error(confidence[:, i], agrees[:, i])
            for i, layer in enumerate(model.exit_config.layers)
        }
        result["speed_at_99"] = expected_speed(
            confidence,
            agrees,
            model.exit_config.layers,
            backbone.num_layers,
            head=head,
            read=_GATE_READ if by_gate else head,
        )
        return result

    def finished_model(self) -> AdaptiveModel:
        """The trained model as a plain one; every process must call it if the model is sharded."""
        objective = self.trained_objective
        if type(objective).plain_state is Objective.plain_state and not is_sharded(objective):
            return self.adaptive
        return plain_copy(self.adaptive, objective.plain_state())

    def finish(self, folder: Path) -> AdaptiveModel:
        """`finished_model`; also writes what the recipe keeps beside it into the run's folder."""
        if self.trained_objective.writes_extra:
            state = whole_state(self.adaptive)
            if self.args.should_save:
                self.trained_objective.save_extra(folder, state)
        return self.finished_model()

    def train_from(self, checkpoint: Path | None) -> None:
        """`train`; after Ctrl-C it drops the unfinished step and saves a checkpoint."""
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except StepAbandoned:
            step = self.state.global_step
            there = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
            if step > 0 and fault(there, digests=False) is not None:
                self._write_checkpoint(together=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._write_checkpoint(together=True)

    def _write_checkpoint(self, *, together: bool) -> None:
        """Writes a checkpoint to the staging folder, seals it and moves it into place.

        Args:
            together: every process takes part; else this one alone, in the middle of a step.
        """
        folder = Path(str(self.args.output_dir))
        staging, name = folder / STAGING_NAME, f"checkpoint-{self.state.global_step}"
        with writing(folder, name):
            try:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)
                if together:
                    self.accelerator.wait_for_everyone()
                self._saving = True
                assert self.model is not None  # given to __init__
                super()._save_checkpoint(self.model, None)
                if together:
                    self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(staging / name, folder / name)
                    remove_old(folder, newest=self.state.global_step)
            finally:
                self._saving = False
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(self.args.output_dir)
        return os.path.join(folder, STAGING_NAME) if self._saving else folder

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        groups = [] if checkpoint is None or self.optimizer is None else self.optimizer.param_groups
        configured = [(one["initial_lr"], one["weight_decay"]) for one in groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            self._obey(configured)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise DeliberateError(
                f"the optimizer's state in {checkpoint} does not fit this run ({reason}): set "
                "trainer.optimizer and the recipe back, or choose another output_dir"
            ) from None

    def _obey(self, configured: list[tuple[float, float]]) -> None:
        """Rates and decays (of each group of parameters) that the run has now: a checkpoint brings
        those that it was begun with."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's wraps
        if not configured or self.optimizer is None or not isinstance(scheduler, LambdaLR):
            return
        groups = self.optimizer.param_groups
        for group, factor, (rate, decay) in zip(
            groups, scheduler.lr_lambdas, configured, strict=True
        ):
            group["weight_decay"], group["initial_lr"] = decay, rate
            group["lr"] = rate * factor(scheduler.last_epoch)
        scheduler.base_lrs = [rate for rate, _ in configured]
        scheduler._last_lr = [group["lr"] for group in groups]  # what is logged

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        model, state = self.finished_model(), whole_state(self.adaptive)
        if not self.args.should_save:
            return
        model.save_pretrained(folder, merge=True)
        self.trained_objective.save_extra(folder, state)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled != (folder / SHARDED_OPTIMIZER).is_file():
            raise DeliberateError(
                f"{folder} was written {'without' if self.is_fsdp_enabled else 'with'} sharding "
                "(FSDP), and the optimizer states of both kinds differ: resume with the sharding "
                "that the run began with"
            )
        extra = self.trained_objective.load_extra(folder)
        state = (
            AdaptiveModel.from_pretrained(folder, executor="generic").state_dict()
            if extra is None
            else extra
        )
        wanted = self.adaptive.state_dict()
        odd = {n for n, v in state.items() if n not in wanted or wanted[n].shape != v.shape}
        if extra is None:
            odd |= set(wanted) - set(state)
        if odd:
            raise DeliberateError(
                f"{folder} holds another model than the one configured: {sorted(odd)[0]} differs"
            )
        if is_sharded(self.adaptive):
            load_whole_state(self.adaptive, state, strict=extra is None)
        else:
            self.adaptive.load_state_dict(state, strict=extra is None)


def _seed(seed: int, index: int) -> int:
    """The seed of one micro-batch of a run."""
    digest = hashlib.sha256(f"micro-batch:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (batch,) = items
    return batch


def training_arguments(
    folder: Path, settings: Any, *, seed: int, report_to: list[str], run_name: str
) -> TrainingArguments:
    """Trainer's arguments from the `trainer` configuration group."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    processes = world_size(settings.processes)
    sharding: dict[str, Any] = {}
    if settings.fsdp:
        sharding = {"fsdp": True, "fsdp_config": dict(FSDP_ARGUMENTS)}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=1,  # one item is one micro-batch
        gradient_accumulation_steps=settings.micro_batches // processes,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": math.ceil(settings.max_steps * settings.decay_share),
            "decay_type": "linear",
        },
        max_grad_norm=settings.max_grad_norm,
        bf16=use_bf16(settings.bf16),
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=backend if is_worker() else None,
        ddp_find_unused_parameters=False,
        logging_steps=settings.log_every,
        logging_first_step=True,
        save_strategy=SaveStrategy.STEPS,
        save_steps=settings.save_every,
        save_total_limit=None,  # `remove_old` counts intact ones
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=report_to or "none",
        run_name=run_name,
        seed=seed,
        data_seed=seed,
        label_names=["labels"],
        disable_tqdm=True,
        **sharding,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one GPU: no nn.DataParallel
    return arguments


def world_size(processes: int) -> int:
    """Number of processes: that of the launcher, else the setting."""
    return int(os.environ.get("WORLD_SIZE", processes)) if is_worker() else processes
