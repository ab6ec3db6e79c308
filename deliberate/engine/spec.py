"""What one request chooses about its decoding: a frozen object with a stable hash.

Fidelity, thresholds, KV mode and the like are data: they can be compared, stored in a certificate
and sent to another process. What is no data stays beside the spec: exit policies and other hooks,
the sampler, a latency budget, streamers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from deliberate.config import (
    Fidelity,
    KVMode,
    KVStorage,
    Risk,
    as_drafts,
    as_fidelity,
    as_kv_mode,
    as_kv_storage,
    as_risk,
    check_guarantee,
)
from deliberate.engine.long_text_config import LongTextConfig
from deliberate.engine.scheduler import DeepSchedule
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256

_CALIBRATED = (Fidelity.CERTIFIED, Fidelity.BUDGET)
# JSON has no infinity; None is "not given".
_INFINITY = "infinity"


@dataclass(frozen=True, eq=False)
class DecodingSpec:
    """How one request is decoded.

    Two specs are equal where their hashes are. Every field is checked when the spec is made, and so
    is every pair of fields that contradict each other. With `fidelity` None the pairs that depend
    on it are checked by `resolved`.

    Attributes:
        fidelity: ``dense``, ``exact``, ``threshold``, ``certified`` or ``budget``; None: the
            model's own.
        thresholds: least confidence to exit early, one or one per exit, in (0, 1] or infinity (no
            token exits there); None: the model's own.
        lambda_: fidelity ``threshold``: exit thresholds and gate threshold that the model's
            calibration gives for this lambda (seconds per expected disagreement).
        kv_mode: ``defer``, ``propagate`` or ``skip``.
        kv_storage: of keys and values: ``native``, or ``int8``.
        max_pending: most tokens that may be pending above an exit; None: the model's own.
        online: exact mode: choose exits and draft lengths from what is measured while decoding.
        schedule: of deep passes in a batch.
        risk: fidelity ``certified``: ``accuracy`` (the default) or ``token``.
        epsilon, delta: fidelity ``certified``: the largest that will do; None: any.
        gate: run the model's deliberation gate, where it has one; False is the model without.
        long_text: re-weigh where a long text begins to repeat itself; fidelity ``dense``,
            ``exact`` or ``threshold``, with kv_mode ``defer``.
        strict: exact mode in bf16 and fp16 by transformers' modules: dense's own passes choose
            every token whose two best candidates are nearer than a bound (True: 8 steps of the
            dtype at the largest logit; or a number of logits); see `deliberate.engine.strict`.
        lookup_tokens: exact mode: most drafts of a pass that are looked up in the text; 0 for none;
            None: 6 where the exits are untrained, else none.
        draft_tokens: exact mode: most drafts of a pass by the model's draft layer; 0 for none;
            None: 6 where it has one.
        drafts: exact mode: what of the model itself drafts: ``"int4"``, ``"int8"`` or ``"bf16"``,
            all of it with weights so rounded, or the layers of a subset, numbered from 1. Then
            ``draft_tokens`` bounds those drafts (None: 6). None: a draft layer, the text or exits.

    Raises:
        DeliberateError: a value that is not allowed, or two that contradict each other; the message
            names them.
    """

    fidelity: Fidelity | None = None
    thresholds: float | tuple[float, ...] | None = None
    lambda_: float | None = None
    kv_mode: KVMode = KVMode.DEFER
    max_pending: int | None = None
    online: bool = True
    schedule: DeepSchedule = dataclasses.field(default_factory=DeepSchedule)
    risk: Risk | None = None
    epsilon: float | None = None
    delta: float | None = None
    gate: bool = True
    long_text: LongTextConfig | None = None
    strict: bool | float = False
    lookup_tokens: int | None = None
    draft_tokens: int | None = None
    drafts: str | tuple[int, ...] | None = None
    kv_storage: KVStorage = KVStorage.NATIVE

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("fidelity", None if self.fidelity is None else as_fidelity(self.fidelity))
        put("kv_mode", as_kv_mode(self.kv_mode))
        put("kv_storage", as_kv_storage(self.kv_storage))
        put("risk", None if self.risk is None else as_risk(self.risk))
        put("thresholds", _thresholds(self.thresholds))
        put("drafts", as_drafts(self.drafts))
        if self.lambda_ is not None:
            put("lambda_", _number("lambda_", self.lambda_))
            if not self.lambda_ >= 0:
                raise DeliberateError(f"lambda_={self.lambda_} must be 0 or more")
        for name, least in (("max_pending", 1), ("lookup_tokens", 0), ("draft_tokens", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise DeliberateError(
                    f"{name}={value!r} must be a whole number of at least {least}"
                )
        for name in ("online", "gate"):
            if not isinstance(getattr(self, name), bool):
                raise DeliberateError(f"{name}={getattr(self, name)!r}: use True or False")
        if self.schedule is None:
            put("schedule", DeepSchedule())
        if not isinstance(self.schedule, DeepSchedule):
            raise DeliberateError(
                f"schedule={self.schedule!r:.60} is not a DeepSchedule, e.g. "
                "DeepSchedule(max_wait=8)"
            )
        for name in ("epsilon", "delta"):
            if getattr(self, name) is not None:
                check_guarantee(**({"epsilon": 0.5, "delta": 0.5} | {name: getattr(self, name)}))
        if self.long_text is not None and not isinstance(self.long_text, LongTextConfig):
            raise DeliberateError(
                f"long_text={self.long_text!r:.60} is not a LongTextConfig, e.g. "
                "LongTextConfig(threshold=0.2)"
            )
        as_strict(self.strict)
        if self.drafts is not None and self.draft_tokens == 0:
            raise DeliberateError(
                f"drafts={_shown(self.drafts)} with draft_tokens=0: leave one of them out"
            )
        if self.drafts is not None and self.kv_storage is not KVStorage.NATIVE:
            raise DeliberateError(
                f"drafts={_shown(self.drafts)} with kv_storage={str(self.kv_storage)!r}: drafts "
                "are made over keys and values in the model's dtype; leave one of them out"
            )
        if self.lambda_ is not None and self.thresholds is not None:
            raise DeliberateError(
                f"lambda_={self.lambda_} and thresholds={_shown(self.thresholds)}: a lambda gives "
                "the thresholds; use one of the two"
            )
        if self.fidelity is not None:
            self._check_fidelity(self.fidelity)

    # -- what goes with a fidelity -------------------------------------------------------------

    def resolved(self, fidelity: Fidelity) -> DecodingSpec:
        """The same spec with its own fidelity, or where it names none with this one.

        Raises:
            DeliberateError: a field that contradicts the fidelity.
        """
        return self if self.fidelity is not None else dataclasses.replace(self, fidelity=fidelity)

    def _check_fidelity(self, fidelity: Fidelity) -> None:
        if fidelity is not Fidelity.CERTIFIED:
            for name in ("risk", "epsilon", "delta"):
                if getattr(self, name) is not None:
                    value = getattr(self, name)
                    raise DeliberateError(
                        f"{name}={_shown(value)} with fidelity {str(fidelity)!r}: it needs "
                        "'certified'"
                    )
        if fidelity in _CALIBRATED:
            self._check_calibrated(fidelity)
        elif self.lambda_ is not None and fidelity is not Fidelity.THRESHOLD:
            raise DeliberateError(
                f"lambda_={self.lambda_} with fidelity {str(fidelity)!r}: use fidelity 'threshold'"
            )
        if fidelity is Fidelity.EXACT and self.kv_mode is not KVMode.DEFER:
            raise DeliberateError(
                f"kv_mode {str(self.kv_mode)!r} with fidelity 'exact': use 'defer', the others "
                "change the output"
            )
        if self.long_text is not None:
            lossy = self.kv_mode is not KVMode.DEFER and fidelity is not Fidelity.DENSE
            if lossy:
                raise DeliberateError(
                    f"long_text with kv_mode {str(self.kv_mode)!r}: tokens that exit early have "
                    "no final state there; use 'defer'"
                )
        if fidelity is Fidelity.EXACT:
            return
        if as_strict(self.strict) is not None:
            raise DeliberateError(
                f"strict={self.strict!r} with fidelity {str(fidelity)!r}: it is for 'exact'"
            )
        for name in ("lookup_tokens", "draft_tokens", "drafts"):
            if getattr(self, name):
                raise DeliberateError(
                    f"{name}={_shown(getattr(self, name))}: fidelity {str(fidelity)!r} verifies no "
                    f"drafts, use 'exact'; leave {name} out"
                )

    def _check_calibrated(self, fidelity: Fidelity) -> None:
        """A calibration chooses the exits, and is of deferred layers."""
        for name in ("thresholds", "lambda_"):
            if getattr(self, name) is not None:
                raise refused(
                    name,
                    getattr(self, name),
                    fidelity,
                    "its calibration decides which tokens exit",
                )
        if fidelity is Fidelity.BUDGET and self.max_pending is not None:
            reason = "its costs are of the model's own"
            raise refused("max_pending", self.max_pending, fidelity, reason)
        if self.kv_mode is not KVMode.DEFER:
            raise refused(
                "kv_mode", self.kv_mode, fidelity, "its calibration is of kv_mode 'defer'"
            )
        if self.kv_storage is not KVStorage.NATIVE and fidelity is Fidelity.BUDGET:
            reason = "its costs are of keys and values in the model's dtype"
            raise refused("kv_storage", self.kv_storage, fidelity, reason)
        if self.long_text is not None:
            raise DeliberateError(
                f"long_text with fidelity {str(fidelity)!r}: its calibration is of the model "
                "without; use dense, exact or threshold"
            )

    # -- as data -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form with every field; `from_dict` reads it back."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: _as_json(value) for name, value in given.items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DecodingSpec:
        """Reads `to_dict`'s form; a field that it lacks has its default.

        Raises:
            DeliberateError: an unknown key, or a value that is not allowed.
        """
        if not isinstance(raw, Mapping):
            raise DeliberateError(f"decoding spec: an object is needed, found {raw!r:.60}")
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(raw) - set(known))
        if unknown:
            raise DeliberateError(
                f"decoding spec has the unknown key {unknown[0]!r}; known: {', '.join(known)}"
            )
        given = {name: _from_json(value) for name, value in raw.items()}
        for name, kind in (("schedule", DeepSchedule), ("long_text", LongTextConfig)):
            if isinstance(given.get(name), dict):
                given[name] = _settings(kind, given[name], name)
        return cls(**given)

    @cached_property
    def sha256(self) -> str:
        """Hash of all fields that differ from their defaults, hexadecimal.

        A field that a later release adds does not change the hash of a spec without it.
        """
        return json_sha256({name: _as_json(value) for name, value in self.given().items()})

    def given(self) -> dict[str, Any]:
        """Fields that differ from their defaults."""
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            default = DeepSchedule() if one.name == "schedule" else one.default
            # A bound of 0.0 is not False.
            if value != default or isinstance(value, bool) is not isinstance(default, bool):
                found[one.name] = value
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DecodingSpec) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


SPEC_FIELDS = tuple(one.name for one in fields(DecodingSpec))


def spec_of(spec: DecodingSpec | None, given: Mapping[str, Any]) -> DecodingSpec:
    """One spec of a spec and of single settings.

    Args:
        given: by the names of `SPEC_FIELDS`; None where a setting is not given.

    Raises:
        DeliberateError: a setting that the spec states too, or a value that is not allowed.
    """
    if spec is None:
        return DecodingSpec(**given)
    if not isinstance(spec, DecodingSpec):
        raise DeliberateError(
            f"spec={spec!r:.60} is not a DecodingSpec, e.g. DecodingSpec(fidelity='exact')"
        )
    stated = spec.given()
    for name, value in given.items():
        if name in stated and value is not None:
            raise DeliberateError(
                f"{name}={_shown(value)} and spec.{name}={_shown(stated[name])}: give {name} once"
            )
    more = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(spec, **more) if more else spec


def as_strict(value: object) -> float | None:
    """The field `strict`: None where off, else the bound in logits, NaN for the default.

    Raises:
        DeliberateError: not a truth value or a number of at least 0.
    """
    if isinstance(value, bool):
        return math.nan if value else None
    if isinstance(value, int | float) and value >= 0:
        return float(value)
    raise DeliberateError(
        f"strict={value!r}: use True, False, or a bound on the gap in logits of at least 0"
    )


def refused(name: str, value: object, fidelity: Fidelity, reason: str) -> DeliberateError:
    """The error for a setting that a guarantee does not allow."""
    return DeliberateError(
        f"{name}={_shown(value)} with fidelity {str(fidelity)!r}: {reason}; leave {name} out, or "
        "use fidelity 'threshold'"
    )


def _thresholds(value: Any) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(_threshold(one) for one in value)
    return _threshold(value)


def _threshold(value: object) -> float:
    number = _number("thresholds", value)
    if not (0.0 < number <= 1.0 or number == math.inf):
        raise DeliberateError(
            f"threshold {number} is outside (0, 1]; infinity means that no token exits"
        )
    return number


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise DeliberateError(f"{name}={value!r:.60}: a number is needed") from None


def _shown(value: object) -> str:
    """A value in an error of one line; what has no short form by its class."""
    if isinstance(value, list | tuple):
        return repr(list(value))
    if isinstance(value, str):
        return repr(str(value))
    return repr(value if isinstance(value, bool | int | float) else type(value).__name__)


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return _INFINITY
    if isinstance(value, tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, DeepSchedule | LongTextConfig):
        return {name: _as_json(one) for name, one in dataclasses.asdict(value).items()}
    return str(value) if isinstance(value, str) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(one) for one in value)
    if isinstance(value, dict):
        return {name: _from_json(one) for name, one in value.items()}
    return math.inf if value == _INFINITY else value


def _settings(kind: Any, raw: Mapping[str, Any], name: str) -> Any:
    """An object of settings from its fields, or a one-line error that names the unknown one."""
    known = [one.name for one in fields(kind)]
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise DeliberateError(
            f"decoding spec: {name} has the unknown key {unknown[0]!r}; known: {', '.join(known)}"
        )
    return kind(**raw)
