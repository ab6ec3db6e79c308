"""``recipe=draft`` of `deliberate train`: `deliberate fit` as an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from deliberate.train.draft.fit import fit
from deliberate.utils.errors import DeliberateError

NAME = "draft"
# What this recipe reads of the settings of a training run.
_READ = ("recipe", "experiment", "output_dir", "dry_run")


def is_draft(cfg: DictConfig) -> bool:
    """Whether a training configuration asks for it."""
    return bool(cfg.recipe.name == NAME)


def fit_settings(cfg: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """The configuration of `deliberate fit` that a training configuration holds.

    Args:
        arguments: overrides of the command line.

    Raises:
        DeliberateError: an override that this recipe would not obey, or a sweep.
    """
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key.split(".")[0].partition("@")[0] not in _READ:
            raise DeliberateError(
                f"{argument}: recipe=draft trains no weight of the model and does not read it; its "
                "settings are recipe.fit.KEY, as `deliberate fit --help` lists them"
            )
    found: Any = cfg.recipe.fit
    return found


def run(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Fits and saves; a dry run names what it would do."""
    settings = fit_settings(cfg, arguments)
    if cfg.dry_run:
        print(
            f"{settings.model}: {settings.text.tokens} answer tokens, "
            f"{settings.draft.passes} passes over them, {settings.draft.depth} drafts deep, into "
            f"{settings.out}"
        )
        return
    done = fit(settings, say=lambda text: print(text, flush=True))
    print(f"model: {done.folder}")
