"""The command line of `deliberate train` before Hydra reads it: sweeps, replaced settings."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import one_line

# Settings that {...} replaces, where Hydra would merge.
_WHOLE = ("data.weights",)
_MULTIRUN = ("-m", "--multirun")


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the command line starts a sweep and has no other option such as ``--cfg``."""
    options = [argument for argument in arguments if argument.startswith("-")]
    return bool(options) and all(option in _MULTIRUN for option in options)


def settings_of(arguments: Sequence[str]) -> list[str]:
    """The overrides among the arguments."""
    return [argument for argument in arguments if not argument.startswith("-")]


def first_job(arguments: Sequence[str]) -> list[str]:
    """The overrides of a sweep's first job.

    Raises:
        DeliberateError: an override that Hydra cannot read.
    """
    texts = settings_of(arguments)
    first = []
    for text, override in zip(texts, _parsed(texts), strict=True):
        if override.is_sweep_override() and override.is_discrete_sweep():
            text = f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
        first.append(text)
    return first


def swept_keys(arguments: Sequence[str]) -> frozenset[str]:
    """The settings that differ between the jobs of a sweep, by the command line."""
    parsed = _parsed(settings_of(arguments))
    return frozenset(o.get_key_element() for o in parsed if o.is_sweep_override())


def replace_whole_settings(arguments: Sequence[str]) -> list[str]:
    """The arguments, with ``data.weights={...}`` in the form that replaces the group's own.

    Hydra merges: ``data.weights={gsm8k: 1}`` would keep every other source of the group. Adding
    to them is ``+data.weights={...}``, and changing one ``data.weights.NAME=``.

    Raises:
        DeliberateError: such a setting in a sweep, where it could only be merged.
    """
    result = []
    for argument in arguments:
        key = argument.partition("=")[0]
        if key not in _WHOLE:
            result.append(argument)
            continue
        (override,) = _parsed([argument])
        if override.is_sweep_override():
            raise DeliberateError(
                f"{argument}: a sweep cannot replace {key}, it would add to the group's sources: "
                f"sweep over data=GROUP or {key}.NAME"
            )
        if override.type == OverrideType.CHANGE and isinstance(override.value(), dict):
            result += [f"~{key}", f"+{argument}"]
        else:
            result.append(argument)
    return result


def _parsed(texts: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(texts))
    except HydraException as error:
        raise DeliberateError(one_line(error, "train", texts)) from None
