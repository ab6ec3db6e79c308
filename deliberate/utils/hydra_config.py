"""Composing Hydra configurations with errors of one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deliberate.utils.errors import DeliberateError
from deliberate.utils.typed_text import typed_text

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)
"""What Hydra and OmegaConf raise for a configuration that cannot be composed or resolved."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "train": {
        "recipe.think_below": "recipe.gate_threshold",
        "recipe.wide_below": "recipe.initial_threshold",
        "recipe.wide_share": "recipe.initial_share",
    }
}
"""By root configuration: the earlier names of settings, and what they are called now."""

OUTPUT_TEXTS = frozenset({"close_tag", "answer"})
"""Keys of texts in a model's output, which may be blank or empty: ``\\n`` is a new line there."""

OPEN_SECTIONS = frozenset(
    {
        # Names of the user's.
        "budget.tiers",
        "data.files",
        "data.hub",
        "data.weights",
        "sizes",
        # Checked by the task's reader, by `ExitConfig`, by the recipe and by the file's reader.
        "task",
        "task.calibration",
        "task.columns",
        "task.params",
        "exits",
        "recipe",
        "data.files.file",
    }
)
"""Sections to which ``+`` may add settings, by their paths; so may it to every empty one."""

SEARCH_PATH = "hydra.searchpath"
"""Further folders of a group's options, which every command takes."""

# Lines of OmegaConf and Hydra messages that advise on code rather than name the mistake.
_ADVICE = re.compile(r"(To append|full_key|object_type|reference_type|See https|Set the env)")


def compose(name: str, overrides: Sequence[str], *, verbatim: Collection[str] = ()) -> DictConfig:
    """The resolved configuration `name` with command-line overrides applied.

    Replaces Hydra's global state, so call it before a Hydra application runs, not inside one.

    Args:
        name: a root configuration: ``train``, ``eval`` or ``bench``.
        overrides: ``key=value``, in Hydra's grammar.
        verbatim: keys whose values are texts taken as they are, whatever signs a path has, but for
            new lines in `OUTPUT_TEXTS`. `model` must be one outside training, where Hydra would
            look for a group of that name.

    Raises:
        DeliberateError: a mistyped key, group or value; one line that names it.
    """
    _refuse_hydras_own(name, overrides)
    texts: dict[str, str] = {}
    others: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key not in verbatim or not equals:
            others.append(override)
        elif key in OUTPUT_TEXTS:
            texts[key] = typed_text(value)
        elif value.strip():
            texts[key] = value
        else:
            raise DeliberateError(f"{key} is empty: give {key}=...")
    GlobalHydra.instance().clear()
    others = with_experiment(others)
    try:
        cfg = _compose(name, others)
        for key, value in texts.items():
            OmegaConf.update(cfg, key, value)
        OmegaConf.resolve(cfg)
        missing = sorted(OmegaConf.missing_keys(cfg))
    except CONFIGURATION_ERRORS as error:
        raise DeliberateError(one_line(error, name, others)) from None
    if missing:
        raise DeliberateError(f"{missing[0]} has no value: give {missing[0]}=...")
    _refuse_added(name, others, cfg)
    return cfg


def _refuse_hydras_own(name: str, overrides: Sequence[str]) -> None:
    """Refuses settings of Hydra itself where no Hydra application runs: all but `train`; and there
    those that ``+`` adds and Hydra does not have."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if not key.startswith("hydra.") or key == SEARCH_PATH:
            continue
        if name != "train":
            raise DeliberateError(f"{key} is Hydra's own setting, which only train reads: leave it")
        if override.startswith("+"):
            _refuse_unknown_to_hydra(key)


def _refuse_unknown_to_hydra(key: str) -> None:
    """Follows the key into Hydra's own settings as far as their names are fixed."""
    node: Any = OmegaConf.structured(HydraConf)
    path = "hydra"
    for part in key.split(".")[1:]:
        fixed = OmegaConf.is_dict(node) and dataclasses.is_dataclass(OmegaConf.get_type(node))
        if not fixed:
            return  # names of the user's, or of a plugin's
        names = [str(one) for one in node]  # `in node` is false of a key without a value too
        if part not in names:
            listed = ", ".join(names)
            raise DeliberateError(f"there is no setting {key!r}: {path} has {listed}")
        node, path = node._get_node(part), f"{path}.{part}"


def _refuse_added(name: str, overrides: Sequence[str], cfg: DictConfig) -> None:
    """Refuses settings that ``+`` or ``KEY={...}`` adds where nothing reads them.

    Compared with the configuration of the same groups. Sections of names, and those whose reader
    checks what it is given (`OPEN_SECTIONS`), may be added to.
    """
    if not any(text.startswith("+") or "{" in text for text in overrides):
        return
    known = _keys(_compose(name, [text for text in overrides if _chooses(text)]))
    for path in _added(_keys(cfg), known, ""):
        section = path.rpartition(".")[0]
        if not section:
            raise DeliberateError(_unknown_key(path, name))
        node = known
        for part in section.split("."):
            node = node[part]
        listed = ", ".join(f"{section}.{one}" for one in node)
        raise DeliberateError(f"there is no setting {path!r}: the settings are {listed}")


def _keys(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg)


def _chooses(override: str) -> bool:
    """Whether an override chooses an option of a group, or where Hydra looks for them."""
    group = override.partition("=")[0]
    if group.startswith("hydra."):
        return True
    return (resources.files("deliberate.configs") / group.lstrip("~").partition("@")[0]).is_dir()


def _added(node: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Paths in `node` that lie in no open section and not in `known`."""
    for key, value in node.items():
        if key not in known:
            if prefix.rstrip(".") not in OPEN_SECTIONS:
                yield f"{prefix}{key}"
        elif isinstance(value, dict) and isinstance(known[key], dict) and known[key]:
            yield from _added(value, known[key], f"{prefix}{key}.")


def with_experiment(overrides: Sequence[str]) -> list[str]:
    """The overrides with ``+experiment=NAME`` as ``experiment=NAME``.

    The group has its place among the defaults, between the settings that it changes and those of
    `debug`, which change it. Hydra takes ``+`` only where a group has none.
    """
    return [re.sub(r"^\++experiment=", "experiment=", text) for text in overrides]


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_module("deliberate.configs", version_base="1.3"):
        return hydra_compose(name, overrides=list(overrides))


def one_line(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """Hydra's message without its advice, with the override that caused it.

    For a key that configuration `name` does not have, the closest ones that it has.
    """
    mistyped = re.match(r"Could not override '([^']+)'", str(error))
    if mistyped:
        return _unknown_key(mistyped.group(1), name)
    merged = re.match(r"Error merging override \+*([^=]+)=\s*([\[{].*)", str(error), re.DOTALL)
    if merged:
        key, value = merged.groups()
        wanted = "a list, [...]" if value.startswith("{") else "settings by name, {NAME: VALUE}"
        return f"{key}={value[:60]} must be {wanted}"
    unknown = re.search(r"Could not find '([^']+)/([^'/]+)'.*?Available options[^:]*:\n(.*)",
                        str(error), re.DOTALL)  # fmt: skip
    if unknown:
        return _unknown_option(*unknown.groups())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not _ADVICE.match(line)]
    text = re.sub(r"\s+", " ", "; ".join(kept[:3])) or type(error).__name__
    if overrides and not any(word.split("=")[0].lstrip("+~") in text for word in overrides):
        text += f" (overrides: {' '.join(overrides)})"
    return text


def _unknown_option(group: str, given: str, listed: str) -> str:
    options = []
    for line in listed.splitlines():
        if not line.startswith("\t"):  # the search path follows
            break
        options.append(line.strip())
    close = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{group}={given} is unknown{hint}: there is {', '.join(options)}"


def _unknown_key(key: str, name: str) -> str:
    renamed = RENAMED.get(name, {}).get(key)
    if renamed is not None:
        return f"setting {key!r} is now called {renamed}: use {renamed}=..."
    known = list(_leaves(OmegaConf.to_container(_compose(name, [])), ""))
    if key in known:
        return f"setting {key!r} cannot take this value"
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif key.rpartition(".")[0] in OPEN_SECTIONS:
        hint = "a new key is added with +"
    elif "." in key:
        section = key.rpartition(".")[0]
        listed = [one for one in known if one.startswith(f"{section}.")] or known
        hint = f"the settings are {', '.join(listed)}"
    else:
        roots = sorted({one.partition(".")[0] for one in known})
        hint = f"the settings are {', '.join(roots)}"
    return f"there is no setting {key!r}: {hint}"


def _leaves(node: Any, prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
