"""Adaptive-depth inference for causal language models.

The public names are loaded on first use (PEP 562), so that `import deliberate` and `deliberate
--help` load neither torch nor transformers. Everything else in the package may move between
releases.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deliberate.installation import add_clone_folders, refuse_other_project

if TYPE_CHECKING:
    from deliberate.api.model import AdaptiveModel
    from deliberate.engine.engine import Engine
    from deliberate.engine.request import Request
    from deliberate.engine.spec import DecodingSpec
    from deliberate.policies.budget import LatencyBudget

__all__ = ["AdaptiveModel", "DecodingSpec", "Engine", "LatencyBudget", "Request"]
__version__ = "0.1.0"

_MODULES = {
    "AdaptiveModel": "deliberate.api.model",
    "DecodingSpec": "deliberate.engine.spec",
    "Engine": "deliberate.engine.engine",
    "LatencyBudget": "deliberate.policies.budget",
    "Request": "deliberate.engine.request",
}

refuse_other_project()
add_clone_folders(__path__, __file__)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
