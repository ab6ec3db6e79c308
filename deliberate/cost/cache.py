"""Measured cost models kept on disk, by a fingerprint of whatever changes the time."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from deliberate import __version__
from deliberate.cost.model import FORMAT_VERSION, CostModel
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.environment import cpu_name
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.folders import CACHE_VARIABLE, cache_folder
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_files import read_json

# Configuration entries that say where a model came from, not what it computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "architectures")


def fingerprint(backbone: Backbone, exits: ExitConfig, gate: DeliberationGate | None = None) -> str:
    """Hash of whatever changes the time: model shape, exits, deliberation gate, dtype, device,
    threads, versions."""
    shape = {k: v for k, v in backbone.config.to_dict().items() if k not in _INCIDENTAL}
    facts = {
        "format": FORMAT_VERSION,
        "shape": json.loads(json.dumps(shape, default=str)),
        "attention": str(backbone.config._attn_implementation),
        "executor": [
            type(backbone).__name__,
            str(getattr(backbone, "plan", "")),
            str(getattr(backbone, "engine", "")),
        ],
        "exits": [list(exits.layers), str(exits.measure), str(exits.translator), exits.rank],
        **device_facts(backbone),
    }
    if exits.vocabulary:
        facts["exit_vocabulary"] = exits.vocabulary
    if backbone.multi_step(None) is not None:
        facts["ahead"] = True  # models kept before calls of several steps were measured lack them
    if gate is not None:
        facts["gate"] = [str(gate.config.block), gate.config.width, gate.config.heads]
    return json_sha256(facts)


def device_facts(backbone: Backbone) -> dict[str, Any]:
    """Device, dtype, threads and versions of a measurement, JSON-ready."""
    device = backbone.device
    parameter = next(backbone.model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "deliberate": __version__,
        "device": name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def recall(print_: str, folder: Path | None = None) -> CostModel | None:
    """The kept model of a fingerprint, or None; a damaged file is a reason to measure again."""
    path = _path(print_, folder)
    try:
        found = CostModel.from_dict(read_json(path))
    except DeliberateError:
        return None
    return found if found.fingerprint == print_ else None


def keep(cost: CostModel, folder: Path | None = None) -> Path | None:
    """Writes a measured model to the cache, where `cached_cost` finds it; returns the file.

    Where the cache cannot be written this warns and returns None: what was measured can be used
    all the same, and is measured again next time.
    """
    path = _path(cost.fingerprint, folder)
    try:
        write_text(path, json.dumps(cost.to_dict(), indent=1) + "\n")
    except OSError as error:
        warnings.warn(
            f"the cost model was measured but not kept: {path.parent} cannot be written "
            f"({error.strerror}); set {CACHE_VARIABLE} to another folder",
            stacklevel=2,
        )
        return None
    return path


def _path(print_: str, folder: Path | None) -> Path:
    return (cache_folder() if folder is None else folder) / f"cost-{print_[:16]}.json"
