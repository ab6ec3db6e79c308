"""The command line of `deliberate fit`."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

_HELP = {"-h", "--help"}
_TEXTS = ("model", "out")


def fit_config(arguments: Sequence[str]) -> DictConfig:
    """The resolved configuration; a first word without ``=`` is the model.

    Raises:
        DeliberateError: an option, an unknown key, or a missing model or folder.
    """
    given = list(arguments)
    unknown = [argument for argument in given if argument.startswith("-")]
    if unknown:
        raise DeliberateError(f"fit does not know the option {unknown[0]}: settings are key=value")
    if given and "=" not in given[0]:
        given[0] = f"model={given[0]}"
    return compose("fit", given, verbatim=_TEXTS)


def main(arguments: Sequence[str]) -> None:
    """Runs `deliberate fit` with these words."""
    if _HELP & set(arguments):
        print(
            "usage: deliberate fit MODEL out=DIR [KEY=VALUE ...]   e.g. deliberate fit smollm2 "
            "out=reports/fit\n\nsettings (each can be overridden):\n"
        )
        shown = [f"{name}=..." for name in _TEXTS]
        shown += [one for one in arguments if "=" in one and not one.startswith(("-", *_TEXTS))]
        print(OmegaConf.to_yaml(fit_config(shown)), end="")
        return
    cfg = fit_config(arguments)
    from deliberate.train.draft.fit import fit

    done = fit(cfg, say=lambda text: print(text, flush=True))
    print(f"model: {done.folder}")
