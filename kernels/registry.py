"""Defines ops and chooses which implementation of an op runs: by device, dtype, shape, or name.

`Registry.define` makes an op of one function: its parameters are the op's signature, its body
checks the arguments. The `torch.library` operator and its fake are derived from it. Every op has a
torch reference that runs everywhere. Others are registered beside it, by this package or by a user
for other hardware, and must take the op's parameters::

    from deliberate.kernels.registry import KERNELS

    @KERNELS.register("skip_mlp", "mine", lambda request: request.device == "xpu")
    def skip_mlp_mine(residual, normed, gate_up, down, rows, count): ...

The last one registered whose predicate holds is chosen. ``DELIBERATE_KERNELS=torch`` in the
environment, or per op ``DELIBERATE_KERNELS=exit_head=torch,skip_mlp=triton``, or
``with KERNELS.override("torch")`` names one whatever its predicate says.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from deliberate.kernels import ALL_OPS
from deliberate.utils.errors import DeliberateError

VARIABLE = "DELIBERATE_KERNELS"
EVERY_OP = "*"

NAMESPACE = "deliberate"  # of the operators in torch.library

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Parameters = ParamSpec("Parameters")
Outputs = TypeVar("Outputs")


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What is to be computed, as predicates see it.

    Attributes:
        device: type of the device, "cpu" or "cuda" for example.
        dtype: dtype of the activations.
        shape: sizes by the op's names for them, "rows" and "width" among them.
    """

    device: str
    dtype: torch.dtype
    shape: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(activations: Tensor, **shape: int) -> KernelRequest:
        """The request for activations of this device and dtype."""
        return KernelRequest(activations.device.type, activations.dtype, shape)


Predicate = Callable[[KernelRequest], bool]

# Sizes of one token of Qwen2.5-0.5B, by all the names that ops use.
SMALL: Mapping[str, int] = MappingProxyType(
    {
        "rows": 1,
        "width": 896,
        "inner": 4864,
        "outputs": 1152,
        "heads": 14,
        "head_width": 64,
        "capacity": 1024,
        "layers": 12,
        "vocab": 151936,
    }
)


def anywhere(request: KernelRequest) -> bool:
    """Predicate of the torch references."""
    return True


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op."""

    op: str
    backend: str
    predicate: Predicate
    run: Callable[..., Any]


class Registry:
    """Implementations by op, the newest first; an override holds in the current context.

    Args:
        homes: for ops that are not registered yet, the module that registers them when imported.
    """

    def __init__(self, homes: Mapping[str, str] | None = None) -> None:
        self._homes = dict(homes or {})
        self._implementations: dict[str, list[Implementation]] = {}
        self._signatures: dict[str, inspect.Signature] = {}
        self._override: ContextVar[Mapping[str, str] | None] = ContextVar("kernels", default=None)

    def define(
        self, *, writes: Sequence[str] = (), outputs: Callable[..., Outputs] | None = None
    ) -> Callable[[Callable[Parameters, KernelRequest]], Callable[Parameters, Outputs]]:
        """Decorator: makes an op, and its `torch.library` operator, of one function.

        The function has the name, the parameters with their defaults, and the documentation of the
        op. Its body checks the arguments and returns the `KernelRequest` that chooses an
        implementation, which is then called with all arguments by position.

        Args:
            writes: parameters that the op writes in place.
            outputs: makes empty outputs of the op, annotated with their type; also its fake. Takes
                those of the op's arguments that its parameters name. None: the op returns nothing.
        """

        def make(check: Callable[Parameters, KernelRequest]) -> Callable[Parameters, Outputs]:
            name = check.__name__
            signature = inspect.signature(check)
            for known in self._implementations.get(name, []):
                _check_parameters(name, known.backend, known.run, signature)
            self._signatures[name] = signature
            defaults = [one.default for one in signature.parameters.values()]

            def arguments(given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
                if named:
                    bound = signature.bind(*given, **named)
                    bound.apply_defaults()
                    return bound.args
                return (*given, *defaults[len(given) :])

            def run(*given: Any, **named: Any) -> Any:
                full = arguments(given, named)
                return self.select(name, check(*full))(*full)  # type: ignore[call-arg]

            def fake(*given: Any, **named: Any) -> Any:
                if outputs is None:
                    return None
                full = dict(zip(signature.parameters, arguments(given, named), strict=True))
                return outputs(**{key: full[key] for key in inspect.signature(outputs).parameters})

            returned = None if outputs is None else inspect.signature(outputs).return_annotation
            for made in (run, fake):
                made.__name__, made.__doc__ = name, check.__doc__
                vars(made)["__signature__"] = signature.replace(return_annotation=returned)
            operator = torch.library.custom_op(
                f"{NAMESPACE}::{name}", run, mutates_args=tuple(writes)
            )
            operator.register_fake(fake)
            operator.__doc__ = check.__doc__
            return cast("Callable[Parameters, Outputs]", operator)

        return make

    def signature(self, op: str) -> inspect.Signature:
        """The parameters of an op; raises DeliberateError for an unknown one."""
        self._known(op)
        return self._signatures[op]

    def register(
        self, op: str, backend: str, predicate: Predicate = anywhere
    ) -> Callable[[Kernel], Kernel]:
        """Decorator: adds a function as ``backend`` of ``op``, in place of one of that name.

        Raises DeliberateError where the function does not take the parameters of the op.
        """

        def add(function: Kernel) -> Kernel:
            if op in self._signatures:
                _check_parameters(op, backend, function, self._signatures[op])
            self.remove(op, backend)
            added = Implementation(op, backend, predicate, function)
            self._implementations.setdefault(op, []).insert(0, added)
            return function

        return add

    def remove(self, op: str, backend: str) -> None:
        """Forgets a backend of an op, if there is one of that name."""
        kept = [known for known in self._implementations.get(op, []) if known.backend != backend]
        if op in self._implementations:
            self._implementations[op] = kept

    def select(self, op: str, request: KernelRequest) -> Callable[..., Any]:
        """The function that serves ``request``.

        Raises DeliberateError for an override that names an unknown op or backend.
        """
        return self.chosen(op, request).run

    def chosen(self, op: str, request: KernelRequest) -> Implementation:
        """As :meth:`select`, with the name of the backend."""
        known = self._known(op)
        wanted = self._wanted(op)
        if wanted is not None:
            for implementation in known:
                if implementation.backend == wanted:
                    return implementation
        for implementation in known:
            if implementation.predicate(request):
                return implementation
        raise DeliberateError(
            f"no implementation of {op} takes {request.dtype} on {request.device}; "
            f"there are: {', '.join(one.backend for one in known)}"
        )

    @contextmanager
    def override(self, choice: str | Mapping[str, str]) -> Iterator[None]:
        """Within the block, ``choice`` (a backend, or backends by op) is run; inner blocks win.

        Ops that a mapping leaves out keep what they had; ops that lack a backend named for all
        choose as usual.
        """
        given = {EVERY_OP: choice} if isinstance(choice, str) else dict(choice)
        for op, backend in given.items():
            self._check(op, backend)
        # A backend for every op replaces the choices made per op outside.
        outer = {} if EVERY_OP in given else self._override.get() or {}
        token = self._override.set({**outer, **given})
        try:
            yield
        finally:
            self._override.reset(token)

    def choices(self, device: str, dtype: torch.dtype) -> dict[str, tuple[str, tuple[str, ...]]]:
        """By op, the backend chosen for one row of a small model, and all that there are."""
        by_op: dict[str, list[str]] = {}
        for one in self.listing():
            by_op.setdefault(one.op, []).append(one.backend)
        request = KernelRequest(device, dtype, SMALL)
        return {op: (self.chosen(op, request).backend, tuple(known)) for op, known in by_op.items()}

    def listing(self) -> tuple[Implementation, ...]:
        """Every implementation, by op, in the order in which they are asked."""
        for module in self._homes.values():
            importlib.import_module(module)
        return tuple(one for op in sorted(self._implementations) for one in self._known(op))

    def _known(self, op: str) -> list[Implementation]:
        if op not in self._implementations and op in self._homes:
            importlib.import_module(self._homes[op])
        if op not in self._implementations:
            known = ", ".join(sorted({*self._implementations, *self._homes})) or "none"
            raise DeliberateError(f"no op is called {op!r}; there are: {known}")
        return self._implementations[op]

    def _check(self, op: str, backend: str) -> None:
        known = self.listing() if op == EVERY_OP else self._known(op)
        backends = sorted({one.backend for one in known})
        if backend not in backends:
            name = "the kernels" if op == EVERY_OP else op
            raise DeliberateError(
                f"{name} have no backend {backend!r}; there are: {', '.join(backends)}"
            )

    def _wanted(self, op: str) -> str | None:
        here = self._override.get()
        if here is None or not (op in here or EVERY_OP in here):
            text = os.environ.get(VARIABLE, "")
            if not text:
                return None
            here = parse_choice(text)
            for name, backend in here.items():
                self._check(name, backend)
        return here.get(op) or here.get(EVERY_OP)


def _check_parameters(
    op: str, backend: str, function: Callable[..., Any], signature: inspect.Signature
) -> None:
    """Raises unless a function takes an op's parameters in order; more of them need a default."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except ValueError:  # built-in functions have none to look at
        return
    names = [one.name for one in found if one.kind is not one.VAR_KEYWORD]
    wanted = list(signature.parameters)
    extra = found[len(wanted) :]
    required = [
        one.name for one in extra if one.default is one.empty and one.kind < one.VAR_KEYWORD
    ]
    if names[: len(wanted)] != wanted or required:
        raise DeliberateError(
            f"backend {backend!r} of {op} takes ({', '.join(names)}); the op's parameters are "
            f"({', '.join(wanted)}), in this order: more are allowed if they have a default"
        )


@lru_cache(maxsize=8)
def parse_choice(text: str) -> Mapping[str, str]:
    """``"torch"`` or ``"exit_head=torch,skip_mlp=triton"`` -> backends by op ("*": every op)."""
    choice: dict[str, str] = {}
    for part in text.split(","):
        op, equals, backend = part.strip().partition("=")
        name, value = (op.strip(), backend.strip()) if equals else (EVERY_OP, op)
        if not name or not value or name in choice:
            raise DeliberateError(
                f"{VARIABLE}={text!r} is not of the form BACKEND or OP=BACKEND,OP=BACKEND"
            )
        choice[name] = value
    return choice


# One registry for the process, as torch's own of operators is: what a user registers here is what
# the ops find.
KERNELS = Registry({op: f"deliberate.kernels.ops.{op}" for op in ALL_OPS})
