"""Compiled forms of the fused executor's functions, made when first needed.

A program is one function compiled for one kind of input; what differs between its calls (context
length, cache capacity, number of deferred tokens) is a dynamic dimension of its first inputs. Where
there is no C++ compiler, or one fails, the function runs eagerly and the reason is kept.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

# A tensor and the dimension of it that varies.
Varying = tuple[Tensor, int]


def missing_compiler() -> str | None:
    """Why ``torch.compile`` cannot be used for CPU code here, or None."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
        return "TORCHDYNAMO_DISABLE is set"
    named = os.environ.get("CXX")
    names = [named] if named else ["cl"] if sys.platform == "win32" else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        return f"no C++ compiler is found ({', '.join(names)})"
    return None


class Programs:
    """The programs of one executor.

    Args:
        reason: why everything is to run eagerly, or None.

    Attributes:
        reason: the same, or what went wrong since.
        seconds: spent in the first calls of compiled programs, compilation included.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.seconds = 0.0
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        varying: Callable[[], Iterable[Varying]],
    ) -> Any:
        """Calls `function`, compiled if that is possible.

        Args:
            key: names what is compiled in; calls of one key must agree in everything but values
                and `varying` sizes. The function of its first call is kept.
            function: pure but for writes to its arguments.
            varying: asked once, before compilation: which sizes will be others later on.
        """
        if self.reason is not None:
            return function(*arguments)
        program = self._compiled.get(key)
        if program is not None:
            return self._call(program, function, arguments)
        with self._lock:  # one thread compiles, the others wait for it
            return self._first(key, function, arguments, varying)

    def _first(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        varying: Callable[[], Iterable[Varying]],
    ) -> Any:
        """A call that may find nothing compiled; compiles it then."""
        began = time.perf_counter()
        program = self._compiled.get(key)
        if program is None:
            for tensor, dimension in varying():
                torch._dynamo.mark_dynamic(tensor, dimension)
            # dynamic=False: only what is marked varies. Otherwise sizes of one model would become
            # dynamic when another one is compiled.
            # The guards have looked at the sizes already.
            program = torch.compile(
                _own_code(function), fullgraph=True, dynamic=False, options={"size_asserts": False}
            )
        result = self._call(program, function, arguments)
        if self.reason is None and key not in self._compiled:
            self._compiled[key] = program
            self.seconds += time.perf_counter() - began
        return result

    def _call(
        self, program: Callable[..., Any], function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        try:
            return program(*arguments)
        except Exception as error:
            # A broken compiler must not end a generation. What is wrong with the arguments
            # themselves is raised again by the eager call, which writes all that this one wrote.
            result = function(*arguments)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = f"compilation failed: {lines[0][:200]}"
            return result


def canonical(x: Tensor) -> Tensor:
    """The same numbers in the one form that code is compiled for; called under inference mode.

    A program is made for the strides of a tensor and for whether it was made under inference mode.
    Axes of size 1, whose stride depends on what a tensor was cut from, are the caller's to drop.
    """
    return x.contiguous() if x.is_inference() else x.clone(memory_format=torch.contiguous_format)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    Compiled versions are counted per code object and limited to a few; closures made by one `def`
    share theirs.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
