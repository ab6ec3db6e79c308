"""From a version in the registry to one that decodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.api.shared_model import with_calibration
from deliberate.calibration.calibration import Calibration
from deliberate.lifecycle.version import Kind, Source
from deliberate.serving.images import Eyes
from deliberate.serving.metrics import Metrics
from deliberate.serving.served_version import Loaded, ServedVersion
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError


class VersionLoader:
    """Loads versions as the server was started.

    Args:
        model_name: what clients call the model.
        settings: limits.
        executor: of `AdaptiveModel`.
        weights: how weights are stored where a version does not say.
        fidelity: of requests that name none, where a version does not say; None: the model's own.
    """

    def __init__(
        self,
        model_name: str,
        settings: ServerSettings,
        *,
        executor: str = "auto",
        weights: str | None = None,
        fidelity: str | None = None,
    ) -> None:
        self._model_name = model_name
        self._settings = settings
        self._metrics: Metrics | None = None
        self._executor = executor
        self._weights = weights
        self._fidelity = fidelity

    @property
    def metrics(self) -> Metrics:
        """Made with the first version, whose number of layers they state.

        Raises:
            DeliberateError: none was loaded yet.
        """
        if self._metrics is None:
            raise DeliberateError("no version was loaded yet: load one first")
        return self._metrics

    def load(
        self, source: Source, number: int | None, running: Collection[ServedVersion] = ()
    ) -> ServedVersion:
        """A version whose engine is not started; takes seconds where weights are read.

        Args:
            source: of the version.
            number: in the registry.
            running: versions of the same weights share them.

        Raises:
            DeliberateError: a missing or foreign file, or settings that the exits cannot have.
        """
        key = source.model, source.weights or self._weights
        shared = next((v for v in running if v.loaded is not None and v.loaded.key == key), None)
        loaded = self._load(key) if shared is None or shared.loaded is None else shared.loaded
        calibration = loaded.calibration
        if source.calibration is not None:
            calibration = Calibration.load(source.calibration)
        model = with_calibration(loaded.model, None)
        if source.calibration is None:
            model._calibration = calibration  # checked when it is used, as `from_pretrained` does
        else:
            model.set_calibration(calibration)
        fidelity = source.fidelity or self._fidelity
        if fidelity is not None:
            model.fidelity = fidelity
        if source.thresholds is not None:
            model.exit_config.with_thresholds(source.thresholds)
        if self._metrics is None:
            self._metrics = Metrics(self._model_name, model.backbone.num_layers)
        made = ServedVersion(
            model,
            loaded.tokenizer,
            self._model_name,
            self._settings,
            self._metrics,
            number=number,
            thresholds=source.thresholds,
            builder=None if shared is None else shared.builder,
            eyes=loaded.eyes,
        )
        made.loaded, made.source = loaded, source
        return made

    def _load(self, key: tuple[str, str | None]) -> Loaded:
        name, weights = key
        model = AdaptiveModel.from_pretrained(name, executor=self._executor, weights=weights).eval()
        eyes = Eyes.of(model, name, self._settings)
        return Loaded(model, checkpoint.load_tokenizer(name), key, model.calibration, eyes)


def derived(parent: Source, changes: Mapping[str, Any]) -> tuple[Source, Kind]:
    """The source of a version that differs from its parent by these fields, and what that changes.

    A calibration belongs to its exits and weights: with another model the parent's is left out.

    Raises:
        DeliberateError: an unknown field, a model that is not there, or no difference.
    """
    if not changes:
        raise DeliberateError(
            "nothing is changed: give model, calibration, fidelity, thresholds or weights"
        )
    kept = parent.to_dict()
    if changes.get("model", parent.model) != parent.model:
        for name in ("calibration", "thresholds"):
            kept.pop(name, None)
    source = Source.from_dict(kept | dict(changes))
    if source == parent:
        raise DeliberateError("this is what is live already: change something of it")
    if source.calibration is not None:
        Calibration.load(source.calibration)
    if source.model == parent.model:
        return source, Kind.POLICY if source.weights == parent.weights else Kind.WEIGHTS
    place = checkpoint.resolve(source.model)
    if checkpoint.adapter_base(place) is not None:
        return source, Kind.ADAPTER
    saved = checkpoint.read_adaptive_config(place)
    before = checkpoint.read_adaptive_config(checkpoint.resolve(parent.model))
    same = saved is not None and before is not None and saved.base == before.base
    return source, Kind.EXITS if same else Kind.WEIGHTS
