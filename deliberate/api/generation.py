"""`generate` with transformers' conventions around the decode loop.

transformers itself prepares everything: `AdaptiveModel.generate` calls the wrapped model's own
`generate` with :class:`AdaptiveDecoding` as its ``custom_generate``, so generation configuration,
logits processors, stopping criteria, streamers and caches mean what they mean there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from deliberate.api.decodable import DecodableModel
from deliberate.api.generate_output import AdaptiveGenerateOutput, padded, scores_by_step
from deliberate.api.generation_args import check_arguments, check_config, check_model_inputs
from deliberate.api.generation_inputs import (
    DEFAULT_NEW_TOKENS,
    check_long_text,
    check_positions,
    check_prompt,
    own_criteria,
    pad_token,
    take_stop_strings,
    token_chooser,
    unpadded,
    warn_of_context,
    within_context,
)
from deliberate.api.hf_cache import from_transformers, to_transformers
from deliberate.api.lookup import lookup_tokens
from deliberate.api.stopping_criteria import StoppingSteps
from deliberate.api.training_mode import checkpointing_off, refuse_noise
from deliberate.calibration.certificate import Risk
from deliberate.config import Fidelity, KVMode, as_fidelity, as_kv_mode
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import ExitPolicy
from deliberate.engine.long_text import LongTextConfig
from deliberate.engine.loop_settings import Decision, LoopSettings
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.strict import check_strict
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.policies.budget import LatencyBudget, as_budget
from deliberate.policies.exit_policies import MONITOR_EVERY, BudgetPolicy, CertifiedPolicy
from deliberate.policies.guarantee_settings import certified_conditions, check_guarantee_settings
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True, eq=False)
class AdaptiveDecoding:
    """How to decode; callable as transformers' ``custom_generate``.

        decode = AdaptiveDecoding(adaptive_model, fidelity="exact")
        stock_model.generate(**inputs, custom_generate=decode)

    Attributes:
        model: the adaptive model; the stock model that calls must be the one it wraps.
        fidelity: ``dense``, ``exact``, ``threshold``, ``certified`` or ``budget``; the model's own
            by default.
        thresholds: least confidence to exit early, one or one per exit; the model's own by default.
        seed: of sampling; drawn from torch's generator where None.
        kv_mode: ``defer``, ``propagate`` or ``skip``.
        online: exact mode: choose exits and draft lengths from what is measured while decoding.
        schedule: of deep passes in a batch.
        lambda_: fidelity ``threshold``: exit thresholds and gate threshold that the model's
            calibration gives for this lambda (seconds per expected disagreement).
        exit_policy: sets the thresholds while decoding; see `ExitPolicy`.
        decide: replaces the comparison with the thresholds.
        monitor: see `LoopSettings`.
        latency_budget: a `LatencyBudget`, a tier's name or ``{"ms_per_token": 2.5}``; fidelity
            ``budget``, which is taken to be meant where a budget is given.
        risk, epsilon, delta: fidelity ``certified``: which promise; the cheapest certificate of the
            accuracy risk by default.
        gate: let the model's deliberation gate think, where it has one; False is the model without.
        long_text: re-weigh where a long text begins to repeat itself; fidelity ``dense``,
            ``exact`` or ``threshold``, with kv_mode ``defer``.
        strict: exact mode in bf16 and fp16 by transformers' modules: dense's own passes choose
            every token whose two best candidates are nearer than a bound (True: 8 steps of the
            dtype at the largest logit; or a number of logits); see `deliberate.engine.strict`.
        lookup_tokens: drafts of a pass looked up in the text; 0 for none; see `api.lookup`.
        hand_over: write keys and values back into the caller's cache.
        streamer: gets accepted tokens. transformers 5 drops the ``streamer`` of a call
            with ``custom_generate`` after showing it the prompt, so it is named here.
        called: when the caller asked, by `time.perf_counter`; a budget counts from there.
    """

    model: DecodableModel
    fidelity: Fidelity | str | None = None
    thresholds: float | Sequence[float] | None = None
    seed: int | None = None
    kv_mode: KVMode | str = KVMode.DEFER
    online: bool = True
    schedule: DeepSchedule | None = None
    lambda_: float | None = None
    exit_policy: ExitPolicy | None = None
    decide: Decision | None = None
    monitor: Callable[[int, int], None] | None = None
    latency_budget: LatencyBudget | str | Mapping[str, float] | None = None
    risk: Risk | str = Risk.ACCURACY
    epsilon: float | None = None
    delta: float | None = None
    gate: bool = True
    long_text: LongTextConfig | None = None
    strict: bool | float = False
    lookup_tokens: int | None = None
    hand_over: bool = True
    streamer: Any = None
    called: float | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | AdaptiveGenerateOutput:
        """Decodes what transformers has prepared; returns what it would.

        Threads may call at once; where the executor has one set of buffers, they take turns.

        Raises:
            DeliberateError: an empty or too long prompt, or a way of decoding that is not ours.
        """
        if model is not self.model.base:
            raise DeliberateError(
                "custom_generate was given to another model than the one it wraps: call generate "
                "on the adaptive model's `base`"
            )
        with self.model.turn(), checkpointing_off(self.model.backbone.layers):
            return self._decode(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
                model_kwargs,
            )

    def _decode(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList | None,
        generation_config: GenerationConfig | None,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Tensor | AdaptiveGenerateOutput:
        config = generation_config or GenerationConfig()
        check_config(config)
        check_model_inputs(model_kwargs)
        streamer = self.streamer if streamer is None else streamer
        batch = input_ids.shape[0]
        if streamer is not None and batch > 1:
            raise DeliberateError(f"a streamer shows one sequence, the batch has {batch}")
        ends = end_tokens(config)
        pad = pad_token(config, ends)
        mask = model_kwargs.get("attention_mask")
        prompts = unpadded(input_ids, mask, pad)
        check_positions(model_kwargs.get("position_ids"), mask, input_ids)
        longest = max(map(len, prompts))
        width = input_ids.shape[1]
        requested = (config.max_length or width + DEFAULT_NEW_TOKENS) - width
        limit = within_context(requested, longest, self.model.backbone.learned_positions)
        loop = self.loop(
            batch=batch,
            max_new_tokens=limit,
            end_tokens=ends,
            prompt_tokens=longest,
            chooser=token_chooser(logits_processor, config, self.seed, batch, pad),
            keep_scores=bool(config.output_scores and config.return_dict_in_generate),
        )
        cache = model_kwargs.get("past_key_values")
        with torch.inference_mode():
            held = from_transformers(
                cache,
                loop.backbone,
                [len(prompt) for prompt in prompts],
                limit,
                width=width,
                hand_over=self.hand_over,
            )
        device = self.model.device
        shown = input_ids.to(device)
        stopping = StoppingSteps(
            own_criteria(stopping_criteria, config, ends),
            shown,
            pad,
            keep_scores=loop.settings.keep_scores,
        )
        # The loop is in inference mode; what is handed out of it is not, so that it can be trained
        # on and changed in place.
        for freshes in loop.run(
            [prompt.to(device) for prompt in prompts],
            prefixes=input_ids.tolist(),
            cache=held,
            called=self.called,
            keep_rows=self.hand_over and cache is not None,
        ):
            stops = stopping.stops(loop.sequences)
            for index, count in stops.items():
                loop.stop_at(count, index)
            if streamer is not None:
                handed = loop.sequences[0].yielded - len(freshes[0])
                for token in freshes[0][: stops.get(0, handed + len(freshes[0])) - handed]:
                    streamer.put(torch.tensor([token]))
        if isinstance(cache, Cache) and self.hand_over:
            with torch.inference_mode():
                to_transformers(loop, cache, width)
        if streamer is not None:
            streamer.end()
        warn_of_context(loop.traces, requested, self.model.backbone.max_positions)
        sequences = padded(shown, loop, pad)
        if not config.return_dict_in_generate:
            return sequences
        return AdaptiveGenerateOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=scores_by_step(loop) if loop.settings.keep_scores else None,  # type: ignore[arg-type]
            past_key_values=cache if self.hand_over else None,
            trace=loop.trace if batch == 1 else None,
            traces=loop.traces,
            batch=loop.batch,
            budget=getattr(loop.exit_policy, "report", None),
        )

    @torch.inference_mode()
    def loop(
        self,
        *,
        max_new_tokens: int,
        end_tokens: Collection[int],
        batch: int = 1,
        prompt_tokens: int = 1,
        chooser: TokenChooser | None = None,
        keep_scores: bool = False,
    ) -> DecodeLoop:
        """A decode loop over the model.

        Args:
            batch: prompts that will be decoded.
            prompt_tokens: of the longest prompt; what a budget can give depends on it.

        Raises:
            DeliberateError: an unknown fidelity or KV mode, an impossible threshold, a certificate
                that does not hold here, or a budget that nothing can meet.
        """
        model = self.model
        fidelity, exit_policy = self._guarantee(prompt_tokens, max_new_tokens, chooser, batch)
        certified = exit_policy if isinstance(exit_policy, CertifiedPolicy) else None
        exits: ExitConfig = model.exit_config
        if self.thresholds is not None:
            exits = exits.with_thresholds(self.thresholds)
        backbone, reader = model.executor_for(batch)
        lookup = lookup_tokens(self, fidelity, batch)
        drafts = fidelity is Fidelity.EXACT and self.online and not lookup
        planner = model.planner(exits, batch) if drafts else None
        if not isinstance(backbone, FusedBackbone):
            refuse_noise(model.base, self._asked())
        if fidelity is not Fidelity.DENSE:
            model.exits.warn_if_untrained(evaluated=not lookup)
        gate = model.gate if self.gate else None
        strict = check_strict(self.strict, fidelity, backbone, batch, chooser, gate, self.long_text)
        settings = LoopSettings(
            exits=() if lookup else exits.layers,
            thresholds=() if lookup else exits.thresholds,
            fidelity=fidelity,
            max_pending=exits.max_pending,
            max_new_tokens=max_new_tokens,
            end_tokens=end_tokens,
            kv_mode=as_kv_mode(self.kv_mode),
            schedule=self.schedule or DeepSchedule(),
            decide=self.decide,
            keep_scores=keep_scores,
            monitor=self.monitor if certified is None else certified.compare,
            monitor_every=MONITOR_EVERY,
            monitor_offset=0 if certified is None else certified.offset,
            long_text=self.long_text,
            strict=strict,
            lookup_tokens=lookup,
        )
        loop = DecodeLoop(
            backbone,
            None if fidelity is Fidelity.DENSE else reader,
            settings,
            chooser=chooser,
            planner=planner,
            exit_policy=exit_policy,
            gate=gate,
        )
        if isinstance(exit_policy, BudgetPolicy):
            exit_policy.loop = loop
        return loop

    def _asked(self) -> Fidelity:
        """The fidelity that is asked for: a budget alone means ``budget``."""
        if self.fidelity is not None:
            return as_fidelity(self.fidelity)
        return self.model.fidelity if self.latency_budget is None else Fidelity.BUDGET

    def _guarantee(
        self, prompt_tokens: int, limit: int, chooser: TokenChooser | None, batch: int
    ) -> tuple[Fidelity, ExitPolicy | None]:
        """What the loop is asked for, and what sets its thresholds."""
        model, fidelity = self.model, self._asked()
        check_long_text(self.long_text, fidelity, as_kv_mode(self.kv_mode))
        if self.latency_budget is not None and fidelity is not Fidelity.BUDGET:
            raise DeliberateError(
                f"latency_budget with fidelity {str(fidelity)!r}: a budget needs fidelity 'budget'"
            )
        check_guarantee_settings(self, fidelity, chooser)
        if fidelity is Fidelity.BUDGET:
            if self.latency_budget is None:
                raise DeliberateError(
                    "fidelity 'budget' needs latency_budget, e.g. LatencyBudget(ms_per_token=3)"
                )
            budget = as_budget(self.latency_budget)
            wanted = (model, budget, prompt_tokens, limit, batch)
            model.guarantees.feasibility(*wanted).require()
            exact = model.guarantees.exact_within(*wanted)
            if exact is not None:
                return Fidelity.EXACT, exact
            return Fidelity.THRESHOLD, model.guarantees.budget(model, budget, batch)
        if fidelity is Fidelity.CERTIFIED:
            exit_policy = model.guarantees.certified(
                model,
                risk=self.risk,
                epsilon=self.epsilon,
                delta=self.delta,
                conditions=certified_conditions(self),
            )
            faster = model.guarantees.faster_than(
                model, exit_policy.certificate, prompt_tokens, limit, batch
            )
            return (Fidelity.THRESHOLD, exit_policy) if faster is None else (faster, None)
        if self.lambda_ is not None:
            if fidelity is not Fidelity.THRESHOLD or self.exit_policy is not None:
                raise DeliberateError(
                    f"lambda_={self.lambda_} with fidelity {str(fidelity)!r}"
                    f"{'' if self.exit_policy is None else ' and an exit_policy'}: use fidelity "
                    "'threshold' without exit_policy="
                )
            return fidelity, model.guarantees.fixed_lambda(model, self.lambda_)
        return fidelity, self.exit_policy


_OWN_SETTINGS = tuple(
    one.name
    for one in dataclasses.fields(AdaptiveDecoding)
    if one.name not in ("model", "hand_over", "streamer", "called")
)


def generate(model: DecodableModel, inputs: Tensor | None = None, **kwargs: Any) -> Any:
    """Generates as `transformers` does, with early exits where their confidence allows it.

    Args:
        inputs: prompt ids ``[B, n]`` (also as ``input_ids=``), padded on the left.
        **kwargs: those of `AdaptiveDecoding` (fidelity, thresholds, seed, kv_mode, latency_budget,
            ...) and those of transformers' `generate` (attention_mask, generation_config,
            logits_processor, stopping_criteria, streamer, past_key_values, max_new_tokens, ...).
            Ways of decoding that are not ours (beams, contrastive search, ...) are refused by name.

    Returns:
        Ids ``[B, n + new]``, prompts included, or `AdaptiveGenerateOutput` with
        ``return_dict_in_generate=True``.

    Raises:
        DeliberateError: an empty or too long prompt, an unknown or unsupported setting.
    """
    called = time.perf_counter()
    own = {name: kwargs.pop(name) for name in _OWN_SETTINGS if name in kwargs}
    check_arguments(kwargs, _OWN_SETTINGS)
    check_prompt(inputs, kwargs, model.backbone.learned_positions, model.generation_config)
    take_stop_strings(kwargs)
    as_kv_mode(own.get("kv_mode", KVMode.DEFER))
    caches = ("past_key_values", "cache_implementation")
    hand_over = any(kwargs.get(name) is not None for name in caches)
    decoding = AdaptiveDecoding(
        model, **own, hand_over=hand_over, streamer=kwargs.get("streamer"), called=called
    )
    base: Any = model.base
    try:
        return base.generate(inputs, custom_generate=decoding, **kwargs)
    except DeliberateError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DeliberateError(f"generate: {lines[0] if lines else type(error).__name__}") from error
