"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "DELIBERATE_CACHE"


def cache_folder() -> Path:
    """``$DELIBERATE_CACHE``, else ``deliberate`` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(home) if home else Path.home() / ".cache") / "deliberate"
