"""From a model and a spec to the decode loop that obeys it.

Here a fidelity becomes what the loop knows: dense, exact or threshold decoding, with an exit policy
where a certificate, a budget or a lambda sets the thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deliberate.api.decodable import DecodableModel
from deliberate.api.draft_source import SharedRows
from deliberate.api.lookup import draft_limits
from deliberate.api.model_drafts import drafts_by_model
from deliberate.api.training_mode import refuse_noise
from deliberate.config import Fidelity, Risk
from deliberate.engine.constraints import LogitConstraint, check_constrained
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import Decision, ExitPolicy
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.engine.loop_settings import LoopSettings
from deliberate.engine.request import Decoding
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.engine.strict import check_strict
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.guarantee_settings import check_guarantee_settings, decoding_conditions
from deliberate.policies.requested import requested_policy
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True, eq=False)
class Hooks:
    """Objects of the caller's that take part in a generation; no data, so not in its spec.

    Attributes:
        exit_policy: decides which tokens exit; an `ExitPolicy`, a name of `EXIT_RULES` such as
            ``"patience"``, or one with its setting, ``{"patience": 2}``.
        decide: called with exit index, sequence index and confidence: whether the token exits; a
            short form of an exit policy.
        monitor: threshold decoding: called with (agreed, compared), counts of tokens that exited
            early, after every fourth deep pass, which compares them with full depth.

    Raises:
        DeliberateError: an object of another type, or both a policy and a decision.
    """

    exit_policy: ExitPolicy | str | Mapping[str, float] | None = None
    decide: Decision | None = None
    monitor: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        policy = self.exit_policy
        if policy is not None and not isinstance(policy, ExitPolicy | str | Mapping):
            raise DeliberateError(
                f"exit_policy={policy!r:.60} is not an exit policy: derive it from "
                "deliberate.engine.exit_policy.ExitPolicy, or use a name such as 'patience'"
            )
        if policy is not None and self.decide is not None:
            raise DeliberateError(f"exit_policy={_shown(policy)} with decide=: give one of the two")
        for name in ("decide", "monitor"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise DeliberateError(f"{name}={hook!r:.60} cannot be called: give a function")


def _shown(policy: ExitPolicy | str | Mapping[str, float]) -> str:
    return type(policy).__name__ if isinstance(policy, ExitPolicy) else repr(policy)


@dataclass(frozen=True)
class Extent:
    """The size of a generation, and how its tokens are chosen.

    Attributes:
        max_new_tokens: of every sequence.
        end_tokens: ids that end the output.
        batch: sequences.
        prompt_tokens: of the longest prompt; what a budget can give depends on it.
        chooser: how logits become tokens; None for plain greedy decoding.
        keep_scores: keep the processed scores of every token.
        prompts: token ids of each ``[n_i]``, which a certificate may be bound to a form of; none
            where they are not known yet.
        constraints: one of each sequence, or none.
        load: of one sequence of an engine: how many run there, itself included. Executor and
            estimates are those of batches. 0: of no engine.
        draft_rows: of an engine: where a draft layer's keys and values of its sequences lie.
        positions: rotary positions ``[axes, n]`` of all prompts, where they are not 0, 1, 2, ...
        placed_rows: where there are none, images have places of their own in each prompt.
    """

    max_new_tokens: int
    end_tokens: Collection[int]
    batch: int = 1
    prompt_tokens: int = 1
    chooser: TokenChooser | None = None
    keep_scores: bool = False
    prompts: Sequence[Tensor | Sequence[int]] = ()
    constraints: Sequence[LogitConstraint] = ()
    load: int = 0
    draft_rows: SharedRows | None = None
    positions: Tensor | None = None
    placed_rows: bool = False


@torch.inference_mode()
def build_loop(
    model: DecodableModel,
    spec: DecodingSpec,
    hooks: Hooks,
    budget: LatencyBudget | None,
    extent: Extent,
) -> DecodeLoop:
    """A decode loop over the model.

    Args:
        spec: a fidelity that it does not name is the model's own, or ``budget`` where there is one.

    Raises:
        DeliberateError: thresholds that the exits cannot have, a setting that contradicts the
            fidelity, a certificate that does not hold here, or a budget that nothing can meet.
    """
    backbone = model.backbone_for(extent.batch)
    if extent.positions is not None:
        backbone = backbone.placed(extent.positions)
    elif extent.placed_rows:
        backbone.check_places()
        backbone = backbone.with_rows()
    decoding = decoding_of(model, spec, hooks, budget, extent, backbone)
    settings = decoding.settings
    # Folded heads take time and memory: they are not built for what reads no exit.
    reads = settings.exits and settings.fidelity is not Fidelity.DENSE
    return DecodeLoop(
        backbone,
        model.reader(extent.batch) if reads else None,
        settings,
        chooser=extent.chooser,
        planner=decoding.planner,
        drafts=decoding.drafts,
        exit_policy=decoding.exit_policy,
        gate=model.gate if spec.gate else None,
        constraints=extent.constraints,
    )


@torch.inference_mode()
def decoding_of(
    model: DecodableModel,
    spec: DecodingSpec,
    hooks: Hooks,
    budget: LatencyBudget | None,
    extent: Extent,
    backbone: Backbone,
) -> Decoding:
    """What a spec asks for, with what it leaves to the model filled in; as for `build_loop`.

    Args:
        backbone: the executor that will run it.
    """
    spec = spec.resolved(model.fidelity if budget is None else Fidelity.BUDGET)
    if extent.constraints:
        check_constrained(spec, model.backbone.rope_switch)
    fidelity, exit_policy = _guarantee(model, spec, hooks, budget, extent)
    batch, chooser = extent.batch, extent.chooser
    exits = exits_of(model, spec)
    exit_policy = requested_policy(
        exit_policy, hooks.decide, hooks.monitor, exits.thresholds, exits.measure
    )
    own = 1 if extent.load else batch
    drafted, lookup = draft_limits(model, spec, hooks, fidelity, own)
    without_exits = bool(drafted or lookup)
    planned = fidelity is Fidelity.EXACT and spec.online and not without_exits
    planner = model.planner(exits, batch) if planned else None
    if not isinstance(backbone, FusedBackbone):
        assert spec.fidelity is not None
        refuse_noise(model.base, spec.fidelity)
    if fidelity is not Fidelity.DENSE and not drafted:
        model.exits.warn_if_untrained(evaluated=not without_exits)
    gate = model.gate if spec.gate else None
    settings = LoopSettings(
        exits=() if without_exits else exits.layers,
        thresholds=() if without_exits else exits.thresholds,
        fidelity=fidelity,
        max_pending=exits.max_pending,
        max_new_tokens=extent.max_new_tokens,
        end_tokens=extent.end_tokens,
        kv_mode=spec.kv_mode,
        kv_storage=spec.kv_storage,
        schedule=spec.schedule,
        keep_scores=extent.keep_scores,
        long_text=spec.long_text,
        strict=check_strict(spec, backbone, own, chooser, gate),
        lookup_tokens=lookup,
    )
    drafts: LayerDrafts | None = None
    if spec.drafts is not None:
        drafts = drafts_by_model(model, spec.drafts, backbone, drafted, lookup)
    elif drafted:
        drafts = model.draft.drafts(backbone, drafted, lookup, extent.draft_rows)
    seconds = None if budget is None else budget.deadline_seconds
    threshold = None if gate is None else gate.config.think_below
    return Decoding(settings, planner, exit_policy, drafts, threshold, seconds)


def exits_of(model: DecodableModel, spec: DecodingSpec) -> ExitConfig:
    """The model's exits with what the spec changes of them.

    Raises:
        DeliberateError: another number of thresholds than there are exits.
    """
    exits = model.exit_config
    if spec.thresholds is not None:
        exits = exits.with_thresholds(spec.thresholds)
    if spec.max_pending is not None:
        exits = replace(exits, max_pending=spec.max_pending)
    return exits


def _guarantee(
    model: DecodableModel,
    spec: DecodingSpec,
    hooks: Hooks,
    budget: LatencyBudget | None,
    extent: Extent,
) -> tuple[Fidelity, ExitPolicy | str | Mapping[str, float] | None]:
    """The fidelity of the decode loop, and what decides which tokens exit."""
    fidelity = spec.fidelity
    assert fidelity is not None
    if budget is not None and fidelity is not Fidelity.BUDGET:
        raise DeliberateError(
            f"latency_budget with fidelity {str(fidelity)!r}: a budget needs fidelity 'budget'"
        )
    check_guarantee_settings(model, spec, hooks)
    size = (extent.prompt_tokens, extent.max_new_tokens, extent.batch)
    if fidelity is Fidelity.BUDGET:
        if budget is None:
            raise DeliberateError(
                "fidelity 'budget' needs latency_budget, e.g. LatencyBudget(ms_per_token=3)"
            )
        # In an engine others' prompts are run already.
        rows, prompts = extent.load or extent.batch, 1 if extent.load else extent.batch
        asked = (extent.prompt_tokens, extent.max_new_tokens, rows, prompts)
        # A cost model that is measured first needs the executor to itself.
        measured = model.guarantees.known_cost(model) is not None
        with nullcontext() if measured else model.turn():
            found = model.guarantees.feasibility(model, budget, *asked)
        if extent.load > 1 and not found.feasible:
            raise DeliberateError(f"{found.message}, while {extent.load} requests share the passes")
        found.require()
        exact = model.guarantees.exact_within(model, budget, *asked)
        if exact is not None:
            return Fidelity.EXACT, exact
        alike = 0 if extent.load else extent.batch
        return Fidelity.THRESHOLD, model.guarantees.budget(model, budget, alike)
    if fidelity is Fidelity.CERTIFIED:
        exit_policy = model.guarantees.certified(
            model,
            risk=spec.risk or Risk.ACCURACY,
            epsilon=spec.epsilon,
            delta=spec.delta,
            conditions=decoding_conditions(
                model,
                spec,
                max_new_tokens=extent.max_new_tokens,
                chooser=extent.chooser,
                constraint=next(iter(extent.constraints), None),
            ),
            prompts=extent.prompts,
        )
        faster = model.guarantees.faster_than(model, exit_policy.certificate, *size)
        return (Fidelity.THRESHOLD, exit_policy) if faster is None else (faster, None)
    if spec.lambda_ is not None:
        for name in ("exit_policy", "decide"):
            if getattr(hooks, name) is not None:
                raise DeliberateError(
                    f"lambda_={spec.lambda_} and {name}=: both say which tokens exit; use one of "
                    "the two"
                )
        return fidelity, model.guarantees.fixed_lambda(model, spec.lambda_)
    return fidelity, hooks.exit_policy
