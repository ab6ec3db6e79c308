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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from deliberate.budget import LatencyBudget, as_budget
from deliberate.certificate import Risk
from deliberate.config import ExitConfig, Fidelity, KVMode, as_fidelity, as_kv_mode
from deliberate.controller import BudgetReport
from deliberate.conventions import (
    DEFAULT_NEW_TOKENS,
    check_long_text,
    check_prompt,
    end_tokens,
    first_stop,
    own_criteria,
    pad_token,
    refuse_other_ways,
    take_stop_strings,
    token_chooser,
    unpadded,
    warn_of_context,
    within_context,
)
from deliberate.decoding import DecodeLoop
from deliberate.errors import DeliberateError
from deliberate.guarantee_settings import certified_conditions, check_guarantee_settings
from deliberate.handover import from_transformers, to_transformers
from deliberate.leaving import Decision
from deliberate.long_text import LongTextConfig
from deliberate.pacing import Pacer
from deliberate.promises import LOOK_EVERY, BudgetPacer, CertifiedPacer
from deliberate.sampling import TokenChooser
from deliberate.schedule import DeepSchedule
from deliberate.trace import BatchTrace, GenerationTrace

if TYPE_CHECKING:
    from deliberate.model import AdaptiveModel


@dataclass
class AdaptiveGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the traces of the generation.

    Attributes:
        sequences: prompts and generated ids, ``[B, n + new]``, finished rows padded at the end.
        scores: with ``output_scores``, one ``[B, V]`` a step: processed scores of the token that
            stands; rows that had finished hold minus infinity.
        past_key_values: a cache with the keys and values of all tokens but the last, where the
            caller gave one.
        trace: of a batch of 1: where each token was chosen and what was run for it.
        traces: the same for every sequence.
        batch: what they did together.
        budget: fidelity ``budget``: how the response stood to its budget.
    """

    trace: GenerationTrace | None = None
    traces: list[GenerationTrace] | None = None
    batch: BatchTrace | None = None
    budget: BudgetReport | None = None


@dataclass(frozen=True, eq=False)
class AdaptiveDecoding:
    """How to decode; callable as transformers' ``custom_generate``.

        decode = AdaptiveDecoding(adaptive_model, fidelity="exact")
        stock_model.generate(**inputs, custom_generate=decode)

    Attributes:
        model: the adaptive model; the stock model that calls must be the one it wraps.
        fidelity: ``dense``, ``exact``, ``threshold``, ``certified`` or ``budget``; the model's own
            by default.
        thresholds: least confidence to leave, one or one per exit; the model's own by default.
        seed: of sampling; drawn from torch's default generator where None.
        kv_mode: ``defer``, ``propagate`` or ``skip``.
        online: exact mode: choose exits and draft lengths from what is measured while decoding.
        schedule: when deep passes are run in a batch.
        price: fidelity ``threshold``: exits and band at this price of the model's calibration.
        pacer: sets the thresholds while decoding.
        decide: replaces the comparison with the thresholds.
        monitor: see `DecodeLoop`.
        latency_budget: a `LatencyBudget`, a tier's name or ``{"ms_per_token": 2.5}``; fidelity
            ``budget``, which is taken to be meant where a budget is given.
        risk, epsilon, delta: fidelity ``certified``: which promise; the cheapest certificate of the
            accuracy risk by default.
        gate: let the model's deliberation gate think, where it has one; False is the model without.
        long_text: re-weigh where a long text begins to repeat itself; fidelity ``dense``,
            ``exact`` or ``threshold``, with kv_mode ``defer``.
        hand_over: write keys and values back into the caller's cache.
        streamer: gets the tokens as they stand. transformers 5 drops the ``streamer`` of a call
            with ``custom_generate`` after showing it the prompt, so it is named here.
        called: when the caller asked, by `time.perf_counter`; a budget counts from there.
    """

    model: AdaptiveModel
    fidelity: Fidelity | str | None = None
    thresholds: float | Sequence[float] | None = None
    seed: int | None = None
    kv_mode: KVMode | str = KVMode.DEFER
    online: bool = True
    schedule: DeepSchedule | None = None
    price: float | None = None
    pacer: Pacer | None = None
    decide: Decision | None = None
    monitor: Callable[[int, int], None] | None = None
    latency_budget: LatencyBudget | str | Mapping[str, float] | None = None
    risk: Risk | str = Risk.ACCURACY
    epsilon: float | None = None
    delta: float | None = None
    gate: bool = True
    long_text: LongTextConfig | None = None
    hand_over: bool = True
    streamer: Any = None
    called: float | None = None

    @torch.inference_mode()
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

        Raises:
            DeliberateError: an empty or too long prompt, or a way of decoding that is not ours.
        """
        if model is not self.model.base:
            raise DeliberateError(
                "custom_generate was given to another model than the one it wraps: call generate "
                "on the adaptive model's `base`"
            )
        config = generation_config or GenerationConfig()
        refuse_other_ways(config)
        streamer = self.streamer if streamer is None else streamer
        batch = input_ids.shape[0]
        if streamer is not None and batch > 1:
            raise DeliberateError(f"a streamer shows one sequence, the batch has {batch}")
        prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
        longest = max(map(len, prompts))
        asked = (config.max_length or input_ids.shape[1] + DEFAULT_NEW_TOKENS) - input_ids.shape[1]
        limit = within_context(asked, longest, self.model.backbone.learned_positions)
        ends = end_tokens(config)
        loop = self.loop(
            batch=batch,
            max_new_tokens=limit,
            end_tokens=ends,
            prompt_tokens=longest,
            chooser=token_chooser(logits_processor, config, self.seed, batch),
            keep_scores=bool(config.output_scores and config.return_dict_in_generate),
        )
        loop.called = self.called
        cache = model_kwargs.get("past_key_values")
        loop.keep_rows = self.hand_over and cache is not None
        held = from_transformers(
            cache,
            loop.backbone,
            [len(prompt) for prompt in prompts],
            limit,
            width=input_ids.shape[1],
            hand_over=self.hand_over,
        )
        criteria = own_criteria(stopping_criteria, config, ends)
        device = self.model.device
        for freshes in loop.run(
            [prompt.to(device) for prompt in prompts], prefixes=input_ids.tolist(), cache=held
        ):
            for sequence, fresh in zip(loop.sequences, freshes, strict=True):
                if not fresh:
                    continue
                handed = sequence.handed - len(fresh)
                stop = first_stop(sequence.ids(sequence.handed), len(fresh), criteria, device)
                if stop is not None:
                    loop.stop_at(handed + stop, sequence.index)
                if streamer is not None:
                    for token in fresh[:stop]:
                        streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        warn_of_context(loop.traces, asked, self.model.backbone.max_positions)
        sequences = _padded(input_ids.to(device), loop, pad_token(config, ends))
        if isinstance(cache, Cache) and self.hand_over:
            to_transformers(loop, cache, input_ids.shape[1])
        if not config.return_dict_in_generate:
            return sequences
        return AdaptiveGenerateOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=_scores(loop) if loop.leaving.keep_scores else None,  # type: ignore[arg-type]
            past_key_values=cache if self.hand_over else None,
            trace=loop.trace if batch == 1 else None,
            traces=loop.traces,
            batch=loop.batch,
            budget=getattr(loop.pacer, "report", None),
        )

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
        fidelity, pacer = self._promise(prompt_tokens, max_new_tokens, chooser, batch)
        certified = pacer if isinstance(pacer, CertifiedPacer) else None
        exits: ExitConfig = model.exit_config
        if self.thresholds is not None:
            exits = exits.with_thresholds(self.thresholds)
        planner = None
        if fidelity is Fidelity.EXACT and self.online:
            planner = model.planner(exits, batch)
        backbone, reader = model.executor_for(batch)
        loop = DecodeLoop(
            backbone,
            None if fidelity is Fidelity.DENSE else reader,
            exits=exits.layers,
            thresholds=exits.thresholds,
            fidelity=fidelity,
            max_pending=exits.max_pending,
            max_new_tokens=max_new_tokens,
            end_tokens=end_tokens,
            kv_mode=as_kv_mode(self.kv_mode),
            chooser=chooser,
            schedule=self.schedule,
            planner=planner,
            pacer=pacer,
            decide=self.decide,
            monitor=self.monitor if certified is None else certified.look,
            monitor_every=LOOK_EVERY,
            monitor_offset=0 if certified is None else certified.offset,
            keep_scores=keep_scores,
            gate=model.gate if self.gate else None,
            long_text=self.long_text,
        )
        if isinstance(pacer, BudgetPacer):
            pacer.loop = loop
        return loop

    def _promise(
        self, prompt_tokens: int, limit: int, chooser: TokenChooser | None, batch: int
    ) -> tuple[Fidelity, Pacer | None]:
        """What the loop is asked for, and what sets its thresholds."""
        model = self.model
        fidelity = model.fidelity if self.fidelity is None else as_fidelity(self.fidelity)
        if self.latency_budget is not None and self.fidelity is None:
            fidelity = Fidelity.BUDGET
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
            model.promises.feasibility(model, budget, prompt_tokens, limit).require()
            return Fidelity.THRESHOLD, model.promises.budget(model, budget)
        if fidelity is Fidelity.CERTIFIED:
            return Fidelity.THRESHOLD, model.promises.certified(
                model,
                risk=self.risk,
                epsilon=self.epsilon,
                delta=self.delta,
                conditions=certified_conditions(self),
            )
        if self.price is not None:
            if fidelity is not Fidelity.THRESHOLD or self.pacer is not None:
                raise DeliberateError(
                    f"price={self.price} needs fidelity 'threshold' and no pacer of its own"
                )
            return fidelity, model.promises.priced(model, self.price)
        return fidelity, self.pacer


_OWN_SETTINGS = tuple(
    one.name
    for one in dataclasses.fields(AdaptiveDecoding)
    if one.name not in ("model", "hand_over", "streamer", "called")
)


def generate(model: AdaptiveModel, inputs: Tensor | None = None, **kwargs: Any) -> Any:
    """Generates as `transformers` does, leaving early where the exits allow it.

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
    check_prompt(inputs, kwargs, model.backbone.learned_positions)
    refuse_other_ways(kwargs)
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


def _padded(input_ids: Tensor, loop: DecodeLoop, pad: int) -> Tensor:
    made = [sequence.trace.tokens for sequence in loop.sequences]
    width = max(map(len, made))
    rows = [tokens + [pad] * (width - len(tokens)) for tokens in made]
    return torch.cat((input_ids, torch.tensor(rows, device=input_ids.device)), dim=1)


def _scores(loop: DecodeLoop) -> tuple[Tensor, ...]:
    """One ``[B, V]`` a step, as transformers gives them."""
    width = max(len(sequence.records) for sequence in loop.sequences)
    like = loop.sequences[0].scores[0]
    assert isinstance(like, Tensor)
    nothing = torch.full_like(like, float("-inf"))
    return tuple(
        torch.cat(
            [
                sequence.scores[step] if step < len(sequence.scores) else nothing  # type: ignore[misc]
                for sequence in loop.sequences
            ]
        )
        for step in range(width)
    )
