"""Composing Hydra configurations with errors of one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deliberate.errors import DeliberateError


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """The resolved configuration `name` with command-line overrides applied.

    Raises:
        DeliberateError: a mistyped key, group or value; one line that names it.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("deliberate.configs", version_base="1.3"):
            cfg = hydra_compose(name, overrides=list(overrides))
        OmegaConf.resolve(cfg)
        missing = sorted(OmegaConf.missing_keys(cfg))
    except (HydraException, OmegaConfBaseException) as error:
        raise DeliberateError(_one_line(error, overrides)) from None
    if missing:
        raise DeliberateError(f"{missing[0]} has no value: give {missing[0]}=...")
    return cfg


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message without its advice and tracebacks, with the override that caused it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not re.match(r"(To append|full_key|object_type|See https|Set the env|reference_type)", line)
    ]
    text = re.sub(r"\s+", " ", "; ".join(kept[:3])) or type(error).__name__
    if overrides and not any(word.split("=")[0].lstrip("+~") in text for word in overrides):
        text += f" (overrides: {' '.join(overrides)})"
    return text
