"""What a model is made of, remembered: whether modules, parameters or hooks were changed since.

Adapters that are injected (peft), embeddings that are resized, hooks and parametrizations all
replace entries of some module's dictionaries. Comparing those by identity costs about ten
microseconds for a small model, so it can be done at every generation.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn

# Installed by transformers once a model was asked for hidden states; idle unless it is asked again.
_IDLE_HOOKS = "transformers.utils.output_capturing"


class ModelStructure:
    """The modules, parameters and hooks of a model as they are now, by identity.

    Args:
        model: looked through once, now.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._dictionaries: list[dict[Any, Any]] = [
            entries for module in modules for entries in (module._modules, module._parameters)
        ]
        self._hooks: list[dict[Any, Any]] = [
            entries
            for module in modules
            for entries in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._held = self._now()
        # Wrappers that are put around `forward` (accelerate's) are attributes. Those of a whole
        # model change by themselves (its generation settings).
        self._leaf_modules = [vars(module) for module in modules if not module._modules]
        self._attributes = list(map(len, self._leaf_modules))

    def same(self) -> bool:
        """Whether nothing was added, removed or replaced since."""
        now = self._now()
        return (
            len(now) == len(self._held)
            and all(map(is_, now, self._held))
            and list(map(len, self._leaf_modules)) == self._attributes
        )

    def _now(self) -> list[Any]:
        found = [entry for entries in self._dictionaries for entry in entries.values()]
        hooks = [hook for entries in self._hooks if entries for hook in entries.values()]
        # A vision tower is asked for hidden states when it first looks at an image.
        return found + [hook for hook in hooks if getattr(hook, "__module__", None) != _IDLE_HOOKS]


def hooked(module: nn.Module) -> bool:
    """Whether somebody's hook or wrapper changes what a module computes, or may."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    active = any(getattr(hook, "__module__", None) != _IDLE_HOOKS for hook in hooks)
    return active or hasattr(module, "_hf_hook") or "forward" in vars(module)
