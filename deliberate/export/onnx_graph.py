"""`deliberate export onnx`: one graph from token ids to the logits of every exit and of the top.

For engines that run ONNX (https://onnx.ai). Each translator is part of its output's branch, and all
branches share the layers below them. With `past`, the keys and values of earlier tokens are inputs
and those of all tokens outputs, under the names of transformers' and Optimum's graphs, so that an
engine decodes token by token; without, the graph is for study and for scoring.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from deliberate.api.lookup import weights_alone
from deliberate.api.model import AdaptiveModel
from deliberate.installation import install_extra
from deliberate.modeling.exit_states import record_outputs
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file
from deliberate.utils.folders import output_file

INPUT, TOP = "input_ids", "logits"
# How far the runtime's logits may lie from torch's, in units of their spread.
_TOLERANCE = 1e-3
_LARGEST = 2 * 10**9  # bytes of weights; a protobuf message cannot be larger
_EXAMPLE, _OTHER = (2, 12), (3, 17)  # shapes of the ids it is traced with, and tried on
# Tokens before those it is traced with, and the passes in which ids are tried on a graph with past.
_BEFORE, _PASSES = 7, (12, 1, 1, 3)


@dataclass(frozen=True)
class ExportedGraph:
    """What was written.

    Attributes:
        path: the file.
        outputs: names, from the shallowest exit to the top; each float32 ``[batch, tokens, V]``.
        past: names of the inputs of keys and values, layer by layer; float32
            ``[batch, kv_heads, past, head_dim]``, of which ``past`` may be 0. Empty without.
        present: names of the outputs that are the next pass's `past`, in the same order.
        megabytes: of the file.
        apart: the largest difference from torch's logits, on other shapes than the traced one.
    """

    path: Path
    outputs: tuple[str, ...]
    past: tuple[str, ...]
    present: tuple[str, ...]
    megabytes: float
    apart: float


class Names(NamedTuple):
    """Names of a graph's outputs of logits and of its keys and values, in and out."""

    outputs: tuple[str, ...]
    past: tuple[str, ...] = ()
    present: tuple[str, ...] = ()


class ExitLogits(nn.Module):
    """int64 ids ``[B, T]`` -> logits ``[B, T, V]`` of each exit and of the last layer.

    Given the keys and values of earlier tokens, it gives those of all tokens behind the logits.
    """

    def __init__(self, model: AdaptiveModel) -> None:
        super().__init__()
        self.base = model.base
        self.vocabulary = model.backbone.embeddings
        self._model = [model]  # in a list: its modules are the base's, registered once

    def forward(self, input_ids: Tensor, past: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        model, cache = self._model[0], DynamicCache()
        # Without a configuration its layers keep all tokens; masks are what makes windows.
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        backbone, exits = model.backbone, model.exit_config.layers
        with record_outputs(backbone.layers, (*exits, backbone.num_layers)) as states:
            kept = {"past_key_values": cache} if past else {}
            self.base.base_model(input_ids=input_ids, use_cache=bool(past), **kept)
        normed = [backbone.norm(states[layer]) for layer in exits]
        logits = [
            backbone.head_logits(model.exits.translate(index, state))
            for index, state in enumerate(normed)
        ]
        logits.append(backbone.head_logits(backbone.norm(states[backbone.num_layers])))
        return (*logits, *_parts(cache))

    @torch.no_grad()
    def keys_and_values(self, ids: Tensor) -> list[Tensor]:
        """Of a pass over ids ``[B, T]``: keys and values of each layer in turn."""
        cache = DynamicCache()
        self.base.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return _parts(cache)


def _parts(cache: Any) -> list[Tensor]:
    """Keys and values of each layer in turn."""
    return [part for one in cache.layers for part in (one.keys, one.values)]


def export_onnx(name: str, out: Path, *, past: bool = False) -> ExportedGraph:
    """Writes the graph and compares what ONNX Runtime computes with torch.

    Args:
        name: as `AdaptiveModel.from_pretrained` takes it.
        out: a new file that ends in ``.onnx``.
        past: keys and values are inputs and outputs.

    Raises:
        DeliberateError: `out` exists or ends otherwise, a package is missing, torch.export does not
            carry the model, or the runtime computes something else.
    """
    if out.suffix != ".onnx":
        raise DeliberateError(f"out {out} must end in .onnx")
    if out.exists():
        raise DeliberateError(f"out {out} exists: name a new file")
    output_file(out)  # a place that cannot be written is reported before minutes of tracing
    runtime = _runtime()
    with weights_alone():
        model = AdaptiveModel.from_pretrained(name, executor="generic")
    size = sum(one.nbytes for one in model.base.parameters())
    if size > _LARGEST:
        raise DeliberateError(
            f"{name} has {size / 1e9:.1f} GB of weights: one ONNX file holds at most 2"
        )
    graph = ExitLogits(model).eval()
    outputs = (*(f"exit_{layer}" for layer in model.exit_config.layers), TOP)
    parts = [
        f"{layer}.{part}"
        for layer in range(model.backbone.num_layers if past else 0)
        for part in ("key", "value")
    ]
    names = Names(
        outputs,
        tuple(f"past_key_values.{part}" for part in parts),
        tuple(f"present.{part}" for part in parts),
    )
    program = _traced(graph, names, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as partial:
        program.save(str(partial))
        apart = _difference(runtime, partial, graph, names, name)
        if not apart <= _TOLERANCE:
            raise DeliberateError(
                f"ONNX Runtime's logits of {name} differ from torch's by {apart:.2g} of their "
                "spread: it cannot be exported"
            )
    return ExportedGraph(out, *names, out.stat().st_size / 1e6, apart)


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401  (torch's exporter needs both)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DeliberateError(
            f"writing ONNX needs the package {error.name}: {install_extra('onnx')}"
        ) from None
    return onnxruntime


def _traced(graph: ExitLogits, names: Names, name: str) -> Any:
    """The program of torch's exporter, for any batch and any number of tokens."""
    vocabulary = graph.vocabulary
    example = torch.arange(_EXAMPLE[0] * _EXAMPLE[1]).view(_EXAMPLE) % vocabulary
    longest = getattr(graph.base.config, "max_position_embeddings", None)
    batch = torch.export.Dim("batch")
    arguments: tuple[Any, ...] = (example,)
    shapes: dict[str, Any]
    if names.past:
        shapes = {INPUT: {0: batch, 1: torch.export.Dim("tokens")}}
        arguments += (graph.keys_and_values(example[:, :_BEFORE]),)
        shapes["past"] = [{0: batch, 2: torch.export.Dim("past")} for _ in names.past]
    else:
        shapes = {INPUT: {0: batch, 1: torch.export.Dim("tokens", min=2, max=longest)}}
    quiet = logging.getLogger("torch.onnx")
    before, quiet.level = quiet.level, logging.ERROR
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                graph,
                arguments,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[INPUT, *names.past],
                output_names=[*names.outputs, *names.present],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise DeliberateError(f"torch.export does not carry {name}: {_reason(error)}") from None
    finally:
        quiet.setLevel(before)


def _reason(error: BaseException) -> str:
    """The first line of what an exporter's error was raised from; its own is advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@torch.no_grad()
def _difference(runtime: Any, path: Path, graph: ExitLogits, names: Names, name: str) -> float:
    """Of the runtime's logits and torch's over whole prompts, in units of torch's spread."""
    vocabulary = graph.vocabulary
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, _OTHER, generator=generator)
    expected = [one.float().numpy() for one in graph(ids)]
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        if names.past:
            found = _stepwise(session, ids.numpy(), names)
        else:
            found = session.run(list(names.outputs), {INPUT: ids.numpy()})
    except Exception as error:  # the runtime's errors have no class of their own
        raise DeliberateError(
            f"ONNX Runtime does not run the graph of {name}: {_reason(error)}"
        ) from None
    worst = 0.0
    for mine, theirs in zip(expected, found, strict=True):
        worst = max(worst, float(np.abs(theirs - mine).max() / mine.std()))
    return worst


def _stepwise(session: Any, ids: Any, names: Names) -> list[Any]:
    """Logits of each output for ids ``[B, T]``, computed in several passes."""
    batch, logits = len(ids), len(names.outputs)
    shapes = [one.shape for one in session.get_inputs()[1:]]
    held = [np.zeros((batch, heads, 0, size), np.float32) for _, heads, _, size in shapes]
    passes, start = [], 0
    for count in _PASSES:
        given = {INPUT: ids[:, start : start + count], **dict(zip(names.past, held, strict=True))}
        made = session.run([*names.outputs, *names.present], given)
        passes.append(made[:logits])
        held, start = made[logits:], start + count
    return [np.concatenate(parts, axis=1) for parts in zip(*passes, strict=True)]
