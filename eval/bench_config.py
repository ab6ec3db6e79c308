"""Settings of the benches: composed, and their output checked before anything is measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from omegaconf import DictConfig

from deliberate.configuration import compose
from deliberate.folders import output_file, output_folder


def bench_config(
    name: str,
    arguments: Sequence[str],
    *,
    verbatim: Collection[str],
    folder: bool = False,
    required: bool = False,
) -> DictConfig:
    """The resolved configuration of a bench; `out`, where given, is a place that can be written.

    Args:
        name: of a root configuration, ``bench`` or ``bench_...``.
        arguments: overrides, ``key=value``.
        verbatim: keys whose values are taken as they are, see `compose`.
        folder: `out` is a folder, not a file.
        required: there is no run without an `out`.

    Raises:
        DeliberateError: a mistyped key or value, or an `out` that cannot be written.
    """
    cfg = compose(name, arguments, verbatim=verbatim)
    if required or cfg.out is not None:
        cfg.out = str(output_folder(cfg.out) if folder else output_file(cfg.out))
    return cfg
