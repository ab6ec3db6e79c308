"""What `deliberate env` prints."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, devices, threads, models, data, and what is missing."""
    from deliberate.data.sources import DATA_VARIABLE
    from deliberate.kernels.backends import describe

    folder = os.environ.get(DATA_VARIABLE)
    found = Path(folder).glob("*/*.jsonl") if folder else ()
    return describe() | {
        # not taken from `deliberate.api.checkpoint`, whose import of transformers takes seconds
        "bundled_models": sorted(
            entry.name
            for entry in resources.files("deliberate.checkpoints").iterdir()
            if entry.is_dir()
        ),
        DATA_VARIABLE: folder,
        "data_sets": sorted(f"{path.parent.name}/{path.stem}" for path in found),
    }
