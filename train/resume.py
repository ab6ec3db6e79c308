"""Whether the run in a folder has the same configuration, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deliberate.train.checkpoints import step_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import RENAMED

CHANGED = "changed"
"""``resume=changed``: resume although settings differ."""

# Settings that may change between a run and its continuation without changing the weights. The
# number of processes is one: batches and random draws depend on the micro-batch alone.
_FREE_TO_CHANGE = ("output_dir", "resume", "logger", "debug", "dry_run", "trainer.log_every",
                   "trainer.save_every", "trainer.processes", "trainer.gradient_checkpointing",
                   "trainer.held_out", "trainer.held_out_every", "data.dir")  # fmt: skip


def is_free(key: str) -> bool:
    """Whether a setting may change between a run and its continuation."""
    return any(key == name or key.startswith(f"{name}.") for name in _FREE_TO_CHANGE)


def changed_settings(before: DictConfig, now: DictConfig) -> list[str]:
    """``key was A and is B`` for every setting that makes it another run."""
    keys = sorted({*_keys(before), *_keys(now)})
    lines = []
    for key in keys:
        if is_free(key):
            continue
        was, is_now = _value(before, key), _value(now, key)
        if was != is_now:
            lines.append(f"{key} was {was} and is {is_now}")
    return lines


def check_same_run(cfg: DictConfig, folder: Path) -> list[str]:
    """Compares with the configuration that `folder` was made with; the differences.

    Raises:
        DeliberateError: there are any, and ``resume`` is not ``changed``.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    before = _read(path)
    different = changed_settings(before, cfg)
    if different and cfg.resume != CHANGED:
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise DeliberateError(
            f"output_dir={folder} holds a run of another configuration: {different[0]}{more}; "
            "set it back, choose another output_dir, or say resume=changed"
        )
    return different


def _read(path: Path) -> DictConfig:
    try:
        found = OmegaConf.load(path)
        if isinstance(found, DictConfig):
            for old, new in RENAMED["train"].items():
                _rename(found, old, new)
    except Exception as error:  # of YAML's scanner, its number parser and OmegaConf
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DeliberateError(
            f"{path} is damaged ({reason}): choose another output_dir, or write it again with "
            "`deliberate train --cfg job --resolve` and the settings of that run"
        ) from None
    if not isinstance(found, DictConfig):
        raise DeliberateError(
            f"{path} is not the configuration of a run: choose another output_dir"
        )
    return found


def _rename(cfg: DictConfig, old: str, new: str) -> None:
    """Gives a setting that an earlier release wrote the name that it has now."""
    group, _, key = old.rpartition(".")
    node = OmegaConf.select(cfg, group)
    if isinstance(node, DictConfig) and key in node:
        OmegaConf.update(cfg, new, node.pop(key), force_add=True)


def check_steps_left(cfg: DictConfig, checkpoint: Path | None) -> None:
    """Refuses to resume from a checkpoint that is past the run's end.

    Raises:
        DeliberateError: it has more steps than ``trainer.max_steps``.
    """
    done = 0 if checkpoint is None else step_of(checkpoint)
    if done > cfg.trainer.max_steps:
        raise DeliberateError(
            f"trainer.max_steps={cfg.trainer.max_steps} but {checkpoint} has done {done} steps: "
            f"give at least {done}, or delete the checkpoints after the step to resume from"
        )


def report_resuming(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> None:
    """Prints which checkpoint the run resumes from, and which settings differ."""
    if checkpoint is None:
        print(f"resume: no finished checkpoint in {folder} yet, starting anew", flush=True)
        return
    print(f"resume: from {checkpoint}", flush=True)
    for line in check_same_run(cfg, folder):
        print(f"resume: {line}: not the same run any more", flush=True)


def _value(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, DictConfig):
            yield from _keys(value, prefix + str(name) + ".")
        else:
            yield prefix + str(name)
