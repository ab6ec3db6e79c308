"""`deliberate export onnx`: one graph from token ids to the logits of every exit and of the top.

For engines that run ONNX (https://onnx.ai), for study and for scoring: it has no KV cache, so it
does not decode step by step. Each translator is part of its output's branch, and all branches share
the layers below them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deliberate.api.lookup import weights_alone
from deliberate.api.model import AdaptiveModel
from deliberate.installation import install_extra
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file

INPUT, TOP = "input_ids", "logits"
# How far the runtime's logits may lie from torch's, in units of their spread.
_TOLERANCE = 1e-3
_LARGEST = 2 * 10**9  # bytes of weights; a protobuf message cannot be larger
_EXAMPLE, _OTHER = (2, 12), (3, 17)  # shapes of the ids it is traced with, and tried on


@dataclass(frozen=True)
class ExportedGraph:
    """What was written.

    Attributes:
        path: the file.
        outputs: names, from the shallowest exit to the top; each float32 ``[batch, tokens, V]``.
        megabytes: of the file.
        apart: the largest difference from torch's logits, on other shapes than the traced one.
    """

    path: Path
    outputs: tuple[str, ...]
    megabytes: float
    apart: float


class ExitLogits(nn.Module):
    """int64 ids ``[B, T]`` -> logits ``[B, T, V]`` of each exit and of the last layer."""

    def __init__(self, model: AdaptiveModel) -> None:
        super().__init__()
        self.base = model.base
        self.vocabulary = model.backbone.embeddings
        self._model = [model]  # in a list: its modules are the base's, registered once

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        model = self._model[0]
        states = model(input_ids=input_ids, output_exit_states=True)
        backbone = model.backbone
        exits = [
            backbone.head_logits(model.exits.translate(index, backbone.norm(state)))
            for index, state in enumerate(states.exits)
        ]
        return (*exits, backbone.head_logits(backbone.norm(states.last)))


def export_onnx(name: str, out: Path) -> ExportedGraph:
    """Writes the graph and compares what ONNX Runtime computes with torch.

    Args:
        name: as `AdaptiveModel.from_pretrained` takes it.
        out: a new file that ends in ``.onnx``.

    Raises:
        DeliberateError: `out` exists or ends otherwise, a package is missing, torch.export does not
            carry the model, or the runtime computes something else.
    """
    if out.suffix != ".onnx":
        raise DeliberateError(f"out {out} must end in .onnx")
    if out.exists():
        raise DeliberateError(f"out {out} exists: name a new file")
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
    program = _traced(graph, outputs, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as partial:
        program.save(str(partial))
        apart = _difference(runtime, partial, graph, outputs)
        if not apart <= _TOLERANCE:
            raise DeliberateError(
                f"ONNX Runtime's logits of {name} differ from torch's by {apart:.2g} of their "
                "spread: it cannot be exported"
            )
    return ExportedGraph(out, outputs, out.stat().st_size / 1e6, apart)


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


def _traced(graph: ExitLogits, outputs: tuple[str, ...], name: str) -> Any:
    """The program of torch's exporter, for any batch and any number of tokens."""
    vocabulary = graph.vocabulary
    example = torch.arange(_EXAMPLE[0] * _EXAMPLE[1]).view(_EXAMPLE) % vocabulary
    longest = getattr(graph.base.config, "max_position_embeddings", None)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2, max=longest)}
    quiet = logging.getLogger("torch.onnx")
    before, quiet.level = quiet.level, logging.ERROR
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes={INPUT: shape},
                input_names=[INPUT],
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise DeliberateError(
            f"torch.export does not carry {name}: {str(error).strip().splitlines()[0][:200]}"
        ) from None
    finally:
        quiet.setLevel(before)


@torch.no_grad()
def _difference(runtime: Any, path: Path, graph: ExitLogits, outputs: tuple[str, ...]) -> float:
    vocabulary = graph.vocabulary
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, _OTHER, generator=generator)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(outputs), {INPUT: ids.numpy()})
    worst = 0.0
    for mine, theirs in zip(graph(ids), found, strict=True):
        expected = mine.float().numpy()
        worst = max(worst, float(np.abs(theirs - expected).max() / expected.std()))
    return worst
