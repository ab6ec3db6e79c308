"""AdaptiveModel: a stock Hugging Face causal LM with exits attached."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from deliberate.api import checkpoint
from deliberate.api.adapters import load_adapter
from deliberate.api.draft_files import load_draft
from deliberate.api.draft_source import DraftSources
from deliberate.api.images import SightSurface
from deliberate.api.lookup import announced
from deliberate.api.model_engine import EngineSurface
from deliberate.api.model_executors import ModelExecutors
from deliberate.api.stock_surface import StockSurface
from deliberate.calibration.calibration import CALIBRATION_NAME, Calibration
from deliberate.calibration.fingerprint import Fingerprints
from deliberate.config import Fidelity, as_fidelity
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.executors.draft_executor import check_fits
from deliberate.executors.select import Executor
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate, GateConfig
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.modeling.exit_states import ExitStates, record_outputs
from deliberate.modeling.language_tower import language_tower, whole_model
from deliberate.policies.guarantees import Guarantees
from deliberate.utils.errors import DeliberateError

# Models whose early exit is off in this thread (or task): `AdaptiveModel.dense`.
_DENSE: ContextVar[tuple[int, ...]] = ContextVar("dense", default=())
# Attributes that belong to this process: a copy builds its own.
_DERIVED = ("_executors", "_fingerprints", "guarantees")


class AdaptiveModel(StockSurface, EngineSurface, SightSurface):
    """A causal language model whose easy tokens may exit early.

    Wraps any supported Hugging Face decoder (`deliberate.modeling.architectures`) unchanged: exits
    are separate modules, and with adaptivity off every output is the model's own.
    Threads may share it. What is done to `base` after wrapping (``.to``, resized embeddings, an
    adapter) is seen by the next generation: followed, or refused where the executor cannot run it.

        model = AdaptiveModel.from_pretrained("tiny")
        ids = model.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=200)

    Attributes:
        base: the wrapped transformers model; `LanguageTower` of one that sees.
        backbone: its uniform view.
        exits: what was added: translators and gates.
        gate: the deliberation gate, or None; see `attach_gate`.
        draft: drafts of exact mode by a draft layer, or None; see `attach_draft`.
        fidelity: of `generate`, where the call names none.
        executor: which implementation runs the layers, and why.

    Args:
        base: the model to wrap.
        exits: where, or ``"auto"``.
        fidelity: see above.
        executor: ``generic`` (transformers' own modules; any architecture, training), ``fused``
            (Llama family; inference only) or ``auto`` (fused on a CPU where it can run the model,
            else generic: see the attribute).
        weights: fused: ``"bf16"``, ``"int8"``, ``"q8_0"``, ``"int4"``; ``"file"``: of a GGUF file.
        engine: fused: native (C++), inductor (torch.compile) or eager; None: the first to be had.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        exits: ExitConfig | Sequence[int] | Literal["auto"] = "auto",
        *,
        fidelity: Fidelity | str = Fidelity.EXACT,
        executor: Executor | str = Executor.AUTO,
        weights: str | None = None,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base = language_tower(base)
        num_layers = Backbone(base).num_layers
        if not isinstance(exits, ExitConfig):
            exits = ExitConfig.build(num_layers, exits)
        ExitConfig.build(num_layers, exits.layers, exits.thresholds)
        self._how = {"executor": executor, "weights": weights, "engine": engine}
        self._executors = ModelExecutors(base, exits, self._how)
        reference = next(base.parameters())
        self.exits = ExitHeads(exits, self.backbone.hidden_size).to(
            device=reference.device, dtype=reference.dtype
        )
        self.gate: DeliberationGate | None = None
        self.draft: DraftSources | None = None
        self.fidelity = as_fidelity(fidelity)
        self._fingerprints = Fingerprints(base)
        self._calibration: Calibration | None = None
        self.guarantees = Guarantees()
        self.train(base.training)

    def __getstate__(self) -> dict[str, Any]:
        return {name: held for name, held in vars(self).items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._executors = ModelExecutors(self.base, self.exit_config, self._how)
        self._fingerprints = Fingerprints(self.base)
        self.guarantees = Guarantees()

    # -- description ---------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The wrapped model's uniform view, which decodes one sequence."""
        return self._executors.backbone

    @backbone.setter
    def backbone(self, backbone: Backbone) -> None:
        self._executors.use(backbone)

    @property
    def executor(self) -> str:
        """Which implementation runs the layers of the model as it is now, and why."""
        self._follow()
        return self._executors.chosen

    @property
    def fidelity(self) -> Fidelity:
        """Of `generate`, where the call names none; "dense" inside `dense()`."""
        return Fidelity.DENSE if id(self) in _DENSE.get() else self._fidelity

    @fidelity.setter
    def fidelity(self, fidelity: Fidelity | str) -> None:
        self._fidelity = as_fidelity(fidelity)

    @property
    def exit_config(self) -> ExitConfig:
        """Where the exits are and how they decide."""
        return self.exits.config

    def set_exit_config(self, config: ExitConfig) -> None:
        """Changes thresholds, measure or max_pending; layers and translators must stay.

        Raises:
            DeliberateError: the change would need other weights.
        """
        now = self.exits.config
        for name in ("layers", "translator", "rank", "vocabulary"):
            if getattr(config, name) != getattr(now, name):
                raise DeliberateError(
                    f"{name} {getattr(config, name)} differs from the trained {getattr(now, name)}:"
                    " wrap the model anew to change it"
                )
        self.exits.config = config
        self.guarantees.clear()

    def attach_gate(self, config: GateConfig | None = None) -> DeliberationGate:
        """Adds an untrained deliberation gate, which changes nothing yet; returns it.

        Where there is one with the same tensors, only its threshold and its rounds are set.

        Raises:
            DeliberateError: it does not fit the hidden size, or the gate there has other weights.
        """
        config = config or GateConfig()
        if self.gate is None:
            like = next(self.exits.parameters(), next(self.base.parameters()))
            gate = DeliberationGate(config, self.backbone.hidden_size)
            self.gate = gate.to(device=like.device, dtype=like.dtype).train(self.training)
        elif not config.same_weights(self.gate.config):
            raise DeliberateError(
                f"the model has a gate of block {str(self.gate.config.block)!r}, width "
                f"{self.gate.config.width}, heads {self.gate.config.heads}: set model.gate = None "
                "to attach another"
            )
        self.gate.config = config
        self.guarantees.clear()
        return self.gate

    def attach_draft(self, layer: DraftLayer | None, prior: DraftPrior | None = None) -> None:
        """Drafts by this layer in exact mode from now on; None: no longer.

        Args:
            prior: what was measured of its drafts; a guess where None.

        Raises:
            DeliberateError: it is of a model with another width or fewer tokens.
        """
        if layer is not None:
            check_fits(layer, self.backbone)
        self.draft = None if layer is None else DraftSources(layer, prior or DraftPrior())

    def unload(self) -> PreTrainedModel:
        """The wrapped model as it was: nothing of this wrapper is attached to it."""
        self._executors.forget()
        return whole_model(self.base)

    # -- training ------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_exit_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The wrapped model's forward; with `output_exit_states`, `ExitStates` instead of logits.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]``, 1 for real tokens; None where padding is on the right and
                causality hides it.
        """
        if not output_exit_states:
            return self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        taps = (*self.exit_config.layers, self.backbone.num_layers)
        with record_outputs(self.backbone.layers, taps) as states:
            (self.base if "pixel_values" in kwargs else self.base.base_model)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
            )
        return ExitStates(exits=tuple(states[layer] for layer in taps[:-1]), last=states[taps[-1]])

    # -- decoding ------------------------------------------------------------------------------

    def backbone_for(self, batch: int) -> Backbone:
        """The layers that decode a batch of this size, of `base` as it is now."""
        self._follow()
        return self._executors.backbone_for(batch)

    def reader(self, batch: int = 1) -> ExitReader:
        """Evaluates the exit heads; built again when a weight or setting changed."""
        return self._executors.reader(self.backbone_for(batch), self.exits)

    def planner(self, exits: ExitConfig, batch: int = 1) -> DraftPlanner:
        """Estimates of exact mode at these thresholds, kept from one generation to the next."""
        self._follow()
        return self._executors.planner(exits, batch, self.exits)

    def turn(self) -> AbstractContextManager[Any]:
        """The lock that a generation holds while it runs; see `ModelExecutors.turn`."""
        return self._executors.turn()

    def _follow(self) -> None:
        if self._executors.follow():
            self.guarantees.clear()  # it was measured with other modules

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generates as `transformers` does; arguments: `deliberate.api.generation.generate`."""
        from deliberate.api.generation import generate

        return generate(self, inputs, **kwargs)

    @contextmanager
    def dense(self) -> Iterator[AdaptiveModel]:
        """Early exit off in this thread: every token goes through every layer, then the gate."""
        token = _DENSE.set((*_DENSE.get(), id(self)))
        try:
            yield self
        finally:
            _DENSE.reset(token)

    # -- guarantees ----------------------------------------------------------------------------

    @property
    def calibration(self) -> Calibration | None:
        """Calibrators, policy and certificates, where the model has them."""
        return self._calibration

    def set_calibration(self, calibration: Calibration | str | Path | None) -> None:
        """Uses what `deliberate calibrate` wrote (or its folder), if it belongs to this model.

        Raises:
            DeliberateError: it belongs to other weights or exits.
        """
        if calibration is not None:
            if not isinstance(calibration, Calibration):
                calibration = Calibration.load(calibration)
            weights, exits = self.fingerprints()
            calibration.check(weights=weights, exits=exits)
        self._calibration = calibration
        self.guarantees.clear()

    def require_calibration(self) -> Calibration:
        """The calibration, or a one-line error that says how to get one."""
        if self._calibration is None:
            raise DeliberateError(
                "the model has no calibration: run `deliberate calibrate model=...` and give its "
                "folder to model.set_calibration"
            )
        return self._calibration

    def fingerprints(self) -> tuple[str, str]:
        """SHA-256 of the base weights and of the exits; see `Fingerprints.of`."""
        return self._fingerprints.of(self)

    # -- storage -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        exits: ExitConfig | Sequence[int] | Literal["auto"] | None = None,
        fidelity: Fidelity | str = Fidelity.EXACT,
        executor: Executor | str = Executor.AUTO,
        weights: str | None = None,
        engine: str | None = None,
        **kwargs: Any,
    ) -> AdaptiveModel:
        """Loads a folder that `save_pretrained` wrote, a bundled name, or a stock checkpoint.

        An adapter folder that the recipe `lora` left is loaded merged into its base model, which
        needs the package `peft`.

        Args:
            name_or_path: ``"tiny"`` (bundled), a folder, or a hub name.
            exits: for a stock checkpoint, where to attach exits (default ``"auto"``); for a saved
                adaptive model it must be left out.
            fidelity: of `generate`, where the call names none.
            executor, weights, engine: see `AdaptiveModel`.
            **kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...).

        Raises:
            DeliberateError: a missing, truncated or foreign file, named in one line.
        """
        how: dict[str, Any] = {
            "fidelity": fidelity,
            "executor": executor,
            "weights": weights,
            "engine": engine,
        }
        source = checkpoint.resolve(name_or_path)
        saved = checkpoint.read_adaptive_config(source)
        if saved is None and checkpoint.adapter_base(source) is not None:
            if exits is not None:
                raise DeliberateError(f"{source} has its own exits: leave `exits` out")
            adapted: AdaptiveModel = load_adapter(cls, source, settings_of_model=how, **kwargs)
            return adapted
        if saved is None:
            base = checkpoint.load_base(source, weights=weights, **kwargs)
            stock = cls(base.eval(), exits if exits is not None else "auto", **how)
            return announced(stock, str(name_or_path))
        if exits is not None:
            raise DeliberateError(
                f"{name_or_path} has its own exits after layers {saved.exits.get('layers')}: leave "
                "`exits` out, or load its base model to attach others"
            )
        kwargs |= {"revision": saved.base_revision, "weights": weights}
        base = checkpoint.load_base(saved.base, **kwargs)
        config = ExitConfig.from_dict(saved.exits, num_layers=Backbone(base).num_layers)
        model = cls(base.eval(), config, **how)
        checkpoint.load_exits(source, model.exits)
        if saved.gate is not None:
            checkpoint.load_gate(source, model.attach_gate(GateConfig.from_dict(saved.gate)))
            model.train(base.training)
        if saved.draft is not None:
            model.attach_draft(*load_draft(Path(source), saved.draft))
        if (Path(source) / CALIBRATION_NAME).is_file():
            # Checked against the weights when it is used: they may be loaded in another dtype.
            model._calibration = Calibration.load(source)
        return announced(model, str(name_or_path), saved.base_sample)

    def save_pretrained(self, folder: str | Path, *, merge: bool = False) -> None:
        """Writes the exits and the base model's name; with `merge`, the base model too.

        Without `merge` only what was added, as PEFT does; loading needs the base checkpoint.
        """
        checkpoint.save(self, folder, merge=merge)
        if self._calibration is not None:
            self._calibration.save(Path(folder) / CALIBRATION_NAME)

    def push_to_hub(
        self, repo_id: str, *, merge: bool = False, private: bool | None = None, **kwargs: Any
    ) -> Any:
        """Uploads what `save_pretrained` writes to the hub; the only method that goes there.

        Args:
            repo_id: ``owner/name``.
            merge: the base model too.
            private: of a repository that is made anew.
            **kwargs: of `huggingface_hub.HfApi.upload_folder` (commit_message, revision, ...).
        """
        from huggingface_hub import HfApi

        if "/" not in repo_id:
            raise DeliberateError(f"repo_id {repo_id!r} is not of the form owner/name")
        api = HfApi(token=kwargs.pop("token", None))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, merge=merge)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)
