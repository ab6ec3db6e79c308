"""Ctrl-C while training: the run saves a checkpoint of the last complete step and ends.

A step may take minutes. Where this process can save alone, the step that Ctrl-C interrupts is
abandoned: its gradients are dropped, and weights, optimizer and schedule are those after the
previous step. Sharded runs finish the step, since every process takes part in saving.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Nodes of the backward graph between two hooks in which Python handles signals.
_STRIDE = 8


class StepAbandoned(BaseException):
    """Raised inside a step to abandon it; no subclass of Exception, so that `except Exception`
    does not catch it."""


class StopOnInterrupt(TrainerCallback):
    """Stops and saves a checkpoint on the first Ctrl-C; the second one ends the process.

    Use it as a context manager around `train`: it restores the usual meaning of Ctrl-C.

    Attributes:
        interrupted: whether Ctrl-C ended the run.
        may_abandon: this process can save alone in the middle of a step.
    """

    def __init__(self, *, may_abandon: bool = False, prints: bool = True) -> None:
        self.interrupted = False
        self.may_abandon = may_abandon
        self._prints = prints
        self._signalled = False
        # Gradients are being computed: weights and optimizer are those of the last whole step.
        self._computing = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        # Signals reach the main thread only; elsewhere there is nothing to catch.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._restore()

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        self._signalled = True
        self._restore()  # a second one stops at once
        if self._prints:
            part = "saving" if self._abandons else "finishing this step, then saving"
            print(f"\nCtrl-C: {part}; again: stop without saving", file=sys.stderr, flush=True)
        if self._abandons:
            self.abandon()

    @property
    def _abandons(self) -> bool:
        return self.may_abandon and self._computing

    def abandon(self) -> None:
        """Ends the step by `StepAbandoned`; the caller of `train` saves."""
        self.interrupted = True
        self._computing = False
        raise StepAbandoned

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allows the step to be abandoned."""
        self._computing = True
        if self._signalled and self.may_abandon:
            self.abandon()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forbids it: the weights are about to change."""
        self._computing = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks Trainer to save and stop once any process is interrupted."""
        self.interrupted = self._signalled
        if args.world_size > 1:
            # A process that stopped alone would leave the others waiting for its gradients.
            flag = torch.tensor(float(self._signalled), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True


def handle_signals_in_backward(loss: Tensor) -> None:
    """Lets Python handle signals during a backward pass.

    `backward` is one call into C++, during which Python runs no signal handler; a hook on a node of
    the graph is Python code. Every eighth node gets one, which costs microseconds.
    """
    if loss.grad_fn is None:
        return
    seen = {loss.grad_fn}
    queue, number = [loss.grad_fn], 0
    while queue:
        node = queue.pop()
        if number % _STRIDE == 0:
            node.register_prehook(_nothing)
        number += 1
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)


def _nothing(_gradients: Any) -> None:
    return None
