"""The executors of a model, and what is derived from its weights: exit readers, planners.

Everything here follows from the wrapped model, the exits and a few settings, belongs to this
process, and is built again in a copy. It is checked at the beginning of every generation, because a
model may be moved, resized or given an adapter between two of them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from deliberate.config import MAX_CALL_STEPS
from deliberate.engine.draft_planner import PROBE_PASSES, DraftPlanner
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.structure import ModelStructure
from deliberate.executors.fused.weights import edits
from deliberate.executors.select import Executor, choose_executor, on_cuda
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader, time_exit_heads
from deliberate.utils.errors import DeliberateError

# Settings of exact mode whose estimates are kept at the same time.
MOST_PLANNERS = 8


class ModelExecutors:
    """The executors of one model; threads may share it.

    Args:
        base: the wrapped model.
        exits: where its exits are.
        how: executor, weights and engine, for `choose_executor`.

    Attributes:
        backbone: what decodes one sequence.
        chosen: which executor that is, and why, in one line.

    Raises:
        DeliberateError: the executor that was asked for cannot run the model.
    """

    def __init__(self, base: PreTrainedModel, exits: ExitConfig, how: Mapping[str, Any]) -> None:
        self._base = base
        self._how = dict(how)
        self._layers = exits.layers
        self._lock = threading.RLock()
        self._attach()

    def _attach(self) -> None:
        """Chooses the executor of the model as it is now, and drops readers and planners."""
        structure = ModelStructure(self._base)
        backbone, chosen = choose_executor(self._base, boundaries=self._layers, **self._how)
        # Functions compiled by torch are for one sequence; for more, transformers' own modules on
        # the same (shared) weights are faster, unless the weights are kept in another form.
        shared = isinstance(backbone, FusedBackbone) and backbone.plan.native
        self._batched = Backbone(self._base) if shared else None
        self._readers: dict[bool, tuple[Any, ExitReader]] = {}
        self._planners: dict[Any, DraftPlanner] = {}
        self.backbone, self.chosen = backbone, chosen
        self._structure = structure
        auto = self._how.get("executor", Executor.AUTO) == Executor.AUTO
        # Where ``auto`` chose for; None where the choice does not depend on it.
        self._on_cuda = on_cuda(backbone) if auto else None

    def use(self, backbone: Backbone) -> None:
        """Decodes with this executor from now on, batches too."""
        with self._lock:
            self.backbone, self._batched, self.chosen = backbone, None, "given by the caller"
            self._on_cuda = None
            self.forget()

    def follow(self) -> bool:
        """Follows changes of the model, with another executor where that is needed.

        Returns:
            Whether its modules are no longer those that were wrapped.

        Raises:
            DeliberateError: the executor that was asked for cannot run what it is now.
        """
        changed = False
        if not self._structure.same():
            with self._lock:
                changed = not self._structure.same()
                if changed:
                    before, now = self.backbone.num_layers, Backbone(self._base).num_layers
                    if before != now:
                        raise DeliberateError(
                            f"the wrapped model had {before} layers and now has {now}: wrap it anew"
                        )
                    self._attach()
        if self._on_cuda not in (None, on_cuda(self.backbone)):
            with self._lock:  # moved between devices: ``auto`` may take another executor there
                self._attach()
        if isinstance(self.backbone, FusedBackbone):
            self.backbone.refresh(same_modules=True)
        return changed

    def turn(self) -> AbstractContextManager[Any]:
        """Held while a generation runs: a lock where the executor has buffers at fixed addresses,
        which only one generation can use at a time; else nothing."""
        backbone = self.backbone
        return backbone.turn() if isinstance(backbone, FusedBackbone) else nullcontext()

    def backbone_for(self, batch: int) -> Backbone:
        """The layers that decode a batch of this size."""
        backbone = self.backbone
        alone = isinstance(backbone, FusedBackbone) and not backbone.serves_batches
        if batch > 1 and self._batched is not None and alone:
            return self._batched
        return backbone

    def reader(self, backbone: Backbone, exits: ExitHeads) -> ExitReader:
        """The reader of an executor, built again when a weight or setting changed."""
        # What exits read are normed states; a quantised head has no parameters.
        like = next(backbone.norm.parameters(), next(self._base.parameters()))
        weights = (*exits.parameters(), *exits.buffers(), *backbone.lm_head.parameters())
        key = (
            *(exits.config, backbone, getattr(backbone, "version", 0), like.dtype, like.device),
            *((weight.data_ptr(), edits(weight)) for weight in weights),
        )
        slot = backbone is self.backbone
        held = self._readers.get(slot)
        if held is None or held[0] != key:
            with self._lock:
                held = self._readers.get(slot)
                if held is None or held[0] != key:
                    held = self._readers[slot] = key, self._new_reader(backbone, exits, like)
        return held[1]

    def _new_reader(self, backbone: Backbone, exits: ExitHeads, like: Tensor) -> ExitReader:
        model_bytes = sum(weight.nbytes for weight in self._base.parameters())
        own = next(exits.parameters(), like)
        if (own.dtype, own.device) != (like.dtype, like.device):
            # Only the base model was moved. The exits that are trained and saved stay as they are.
            exits = copy.deepcopy(exits).to(device=like.device, dtype=like.dtype)
        if isinstance(backbone, FusedBackbone):
            return backbone.exit_reader(exits, model_bytes=model_bytes)
        return ExitReader(
            exits,
            backbone.norm,
            backbone.lm_head,
            backbone.head_logits,
            backbone.softcap,
            model_bytes=model_bytes,
        )

    def planner(self, exits: ExitConfig, batch: int, heads: ExitHeads) -> DraftPlanner:
        """Estimates of exact mode at these thresholds, kept from one generation to the next."""
        key = (exits.layers, exits.thresholds, exits.measure, exits.max_pending, batch > 1)
        with self._lock:
            if key not in self._planners:
                if len(self._planners) >= MOST_PLANNERS:
                    self._planners.pop(next(iter(self._planners)))
                backbone = self.backbone_for(batch)
                reader = self.reader(backbone, heads)
                seconds = time_exit_heads(reader, backbone, len(exits.layers))
                probe_passes = (
                    PROBE_PASSES
                    if batch > 1 or backbone.multi_step(reader) is None
                    else MAX_CALL_STEPS
                )
                self._planners[key] = DraftPlanner(
                    len(exits.layers), exits.max_pending, seconds, probe_passes=probe_passes
                )
            return self._planners[key]

    def forget(self) -> None:
        """Drops readers and planners."""
        with self._lock:
            self._readers.clear()
            self._planners.clear()
