"""What a model is called in results: by its run, where its folder's own name says nothing."""

from __future__ import annotations

import re
from pathlib import Path

from deliberate.utils.errors import DeliberateError

# Names that every training run gives its folders, and numbers of jobs, steps, dates and times.
_COMMON = re.compile(r"(model|final|best|last|merged|adapter|outputs?|checkpoints?)", re.IGNORECASE)
_NUMBERED = re.compile(r"(checkpoint[-_])?[\d._-]+")


def model_name(source: object) -> str:
    """``out/run7/model`` -> ``run7``, ``sweep/3/model`` -> ``sweep/3``, ``owner/tiny`` -> ``tiny``.

    Args:
        source: a bundled name, a folder or a hub name, as `AdaptiveModel.from_pretrained` takes it.

    Raises:
        DeliberateError: an empty name.
    """
    text = str(source).strip()
    if not text:
        raise DeliberateError("model has no value: give model=...")
    path = Path(text).expanduser()
    parts = [part for part in path.parts if part not in (path.anchor, ".", "..")]
    if not parts or all(map(_says_nothing, parts)):
        parts = list(path.absolute().resolve().parts[1:])
    kept = len(parts) - 1
    while kept > 0 and _says_nothing(parts[kept]):
        kept -= 1
    named = parts[kept:]
    while len(named) > 1 and _COMMON.fullmatch(named[-1]):
        named.pop()
    return "/".join(named)


def _says_nothing(part: str) -> bool:
    return bool(_COMMON.fullmatch(part) or _NUMBERED.fullmatch(part))
