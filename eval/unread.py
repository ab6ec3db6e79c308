"""Settings of `deliberate eval` that a run would not read, refused by name."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

# Beside defaults: what a run does anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {"device": ("cpu",), "resume": (False,)}
_OF_MODES = ("modes", "strict", "calibration", "risk", "epsilon", "delta", "budget",
             "transformers_limit", "max_running", "device", "resume")  # fmt: skip
_OF_RULES = ("temperature", "reasoning_tags", "controls")


def refuse_unread(cfg: DictConfig) -> None:
    """Compares with the defaults what this run leaves unread.

    Raises:
        DeliberateError: names the first setting that differs.
    """
    defaults = compose("eval", [])
    if cfg.reasoning is not None or cfg.samples is not None:
        _same(cfg, defaults, _OF_MODES, "modes of decoding have it, rules for the reasoning do not")
    else:
        _same(cfg, defaults, _OF_RULES, "it is read with reasoning= or samples=")
        modes = cfg.modes if cfg.fidelity is None else cfg.fidelity
        if OmegaConf.is_list(modes):
            if not {"exact", "threshold"} & set(modes):
                _same(cfg, defaults, ("thresholds",), "it is of the modes exact and threshold")
            if "certified" not in modes:
                _same(cfg, defaults, ("risk",), "it is of the mode certified")
            if "transformers" not in modes:
                _same(cfg, defaults, ("transformers_limit",), "it is of the mode transformers")
    if cfg.chat == "never":
        _same(cfg, defaults, ("system",), "it is a message of the template that chat=never omits")


def _same(cfg: DictConfig, defaults: DictConfig, names: tuple[str, ...], why: str) -> None:
    for name in names:
        value = cfg[name]
        if value != defaults[name] and value not in _HARMLESS.get(name, ()):
            raise DeliberateError(f"{name}={value} would not be read: {why}; leave it out")
