"""`generate` with transformers' conventions around the decode loop.

transformers itself prepares everything: `AdaptiveModel.generate` calls the wrapped model's own
`generate` with :class:`AdaptiveDecoding` as its ``custom_generate``, so generation configuration,
logits processors, stopping criteria, streamers and caches mean what they mean there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StopStringCriteria,
)

from deliberate.config import ExitConfig, Fidelity, KVMode, as_fidelity, as_kv_mode
from deliberate.decoding import Decision, DecodeLoop
from deliberate.errors import DeliberateError
from deliberate.handover import from_transformers, to_transformers
from deliberate.pacing import Pacer
from deliberate.sampling import TokenChooser
from deliberate.schedule import DeepSchedule
from deliberate.trace import BatchTrace, GenerationTrace

if TYPE_CHECKING:
    from deliberate.model import AdaptiveModel

# transformers' own default where neither a length nor a configuration says otherwise
DEFAULT_NEW_TOKENS = 20

# Settings that are another way of decoding, with the values that mean "not this".
_OTHER_WAYS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1, 1.0),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "assistant_model": (),
    "token_healing": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
}


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
    """

    trace: GenerationTrace | None = None
    traces: list[GenerationTrace] | None = None
    batch: BatchTrace | None = None


@dataclass(frozen=True, eq=False)
class AdaptiveDecoding:
    """How to decode; callable as transformers' ``custom_generate``.

        decode = AdaptiveDecoding(adaptive_model, fidelity="exact")
        stock_model.generate(**inputs, custom_generate=decode)

    Attributes:
        model: the adaptive model; the stock model that calls must be the one it wraps.
        fidelity: ``dense``, ``exact`` or ``threshold``; the model's own by default.
        thresholds: least confidence to leave, one or one per exit; the model's own by default.
        seed: of sampling; drawn from torch's default generator where None.
        kv_mode: ``defer``, ``propagate`` or ``skip``.
        online: exact mode: choose exits and draft lengths from what is measured while decoding.
        schedule: when deep passes are run in a batch.
        pacer: sets the thresholds while decoding.
        decide: replaces the comparison with the thresholds.
        monitor: see `DecodeLoop`.
        hand_over: write keys and values back into the caller's cache.
        streamer: gets the tokens as they stand. transformers 5 drops the ``streamer`` of a call
            with ``custom_generate`` after showing it the prompt, so it is named here.
    """

    model: AdaptiveModel
    fidelity: Fidelity | str | None = None
    thresholds: float | Sequence[float] | None = None
    seed: int | None = None
    kv_mode: KVMode | str = KVMode.DEFER
    online: bool = True
    schedule: DeepSchedule | None = None
    pacer: Pacer | None = None
    decide: Decision | None = None
    monitor: Callable[[int, int], None] | None = None
    hand_over: bool = True
    streamer: Any = None

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
        limit = (config.max_length or input_ids.shape[1] + DEFAULT_NEW_TOKENS) - input_ids.shape[1]
        limit = within_context(limit, longest, self.model.backbone.max_positions)
        ends = _end_tokens(config)
        loop = self.loop(
            max_new_tokens=limit,
            end_tokens=ends,
            chooser=_chooser(logits_processor, config, self.seed, batch),
            keep_scores=bool(config.output_scores and config.return_dict_in_generate),
        )
        cache = model_kwargs.get("past_key_values")
        held = None
        if isinstance(cache, Cache):
            loop.keep_rows = self.hand_over
            held = from_transformers(cache, self.model.backbone, [len(p) for p in prompts], limit)
        criteria = _own_criteria(stopping_criteria, config, ends)
        device = self.model.device
        for freshes in loop.run(
            [prompt.to(device) for prompt in prompts], prefixes=input_ids.tolist(), cache=held
        ):
            for sequence, fresh in zip(loop.sequences, freshes, strict=True):
                if not fresh:
                    continue
                handed = sequence.handed - len(fresh)
                stop = _first_stop(sequence.ids(sequence.handed), len(fresh), criteria, device)
                if stop is not None:
                    loop.stop_at(handed + stop, sequence.index)
                if streamer is not None:
                    for token in fresh[:stop]:
                        streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        sequences = _padded(input_ids.to(device), loop, _pad_token(config, ends))
        if isinstance(cache, Cache) and self.hand_over:
            to_transformers(loop, cache, input_ids.shape[1])
        if not config.return_dict_in_generate:
            return sequences
        return AdaptiveGenerateOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=_scores(loop) if loop.keep_scores else None,  # type: ignore[arg-type]
            past_key_values=cache if self.hand_over else None,
            trace=loop.trace if batch == 1 else None,
            traces=loop.traces,
            batch=loop.batch,
        )

    def loop(
        self,
        *,
        max_new_tokens: int,
        end_tokens: Collection[int],
        chooser: TokenChooser | None = None,
        keep_scores: bool = False,
    ) -> DecodeLoop:
        """A decode loop over the model.

        Raises:
            DeliberateError: an unknown fidelity or KV mode, or an impossible threshold.
        """
        model = self.model
        fidelity = model.fidelity if self.fidelity is None else as_fidelity(self.fidelity)
        exits: ExitConfig = model.exit_config
        if self.thresholds is not None:
            exits = exits.with_thresholds(self.thresholds)
        planner = None
        if fidelity is Fidelity.EXACT and self.online:
            planner = model.planner(exits)
        return DecodeLoop(
            model.backbone,
            None if fidelity is Fidelity.DENSE else model.reader(),
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
            pacer=self.pacer,
            decide=self.decide,
            monitor=self.monitor,
            keep_scores=keep_scores,
        )


def generate(
    model: AdaptiveModel,
    inputs: Tensor | None = None,
    *,
    fidelity: Fidelity | str | None = None,
    thresholds: float | Sequence[float] | None = None,
    seed: int | None = None,
    kv_mode: KVMode | str = KVMode.DEFER,
    online: bool = True,
    schedule: DeepSchedule | None = None,
    pacer: Pacer | None = None,
    decide: Decision | None = None,
    monitor: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> Tensor | AdaptiveGenerateOutput:
    """Generates as `transformers` does, leaving early where the exits allow it.

    Args:
        inputs: prompt ids ``[B, n]`` (also as ``input_ids=``), padded on the left.
        fidelity, thresholds, seed, kv_mode, online, schedule, pacer, decide, monitor: see
            `AdaptiveDecoding`.
        **kwargs: those of transformers' `generate`: attention_mask, generation_config,
            logits_processor, stopping_criteria, streamer, past_key_values, max_new_tokens, ...
            Ways of decoding that are not ours (beams, contrastive search, ...) are refused by name.

    Returns:
        Ids ``[B, n + new]``, prompts included, or `AdaptiveGenerateOutput` with
        ``return_dict_in_generate=True``.

    Raises:
        DeliberateError: an empty or too long prompt, an unknown or unsupported setting.
    """
    _check_prompt(inputs, kwargs, model.backbone.max_positions)
    refuse_other_ways(kwargs)
    _take_stop_strings(kwargs)
    decoding = AdaptiveDecoding(
        model,
        fidelity,
        thresholds,
        seed,
        as_kv_mode(kv_mode),
        online,
        schedule,
        pacer,
        decide,
        monitor,
        hand_over=kwargs.get("past_key_values") is not None
        or kwargs.get("cache_implementation") is not None,
        streamer=kwargs.get("streamer"),
    )
    base: Any = model.base
    try:
        return base.generate(inputs, custom_generate=decoding, **kwargs)
    except DeliberateError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DeliberateError(f"generate: {lines[0] if lines else type(error).__name__}") from error


def refuse_other_ways(settings: GenerationConfig | dict[str, Any]) -> None:
    """Raises DeliberateError for a setting that asks for another way of decoding."""
    for name, neutral in _OTHER_WAYS.items():
        given = settings if isinstance(settings, dict) else vars(settings)
        value = given.get(name)
        if value is not None and value not in neutral and value != []:
            raise DeliberateError(
                f"{name}={value!r} is not supported: adaptive depth decodes greedily or by sampling"
            )


def within_context(limit: int, prompt: int, context: int | None) -> int:
    """At most `limit` new tokens, fewer where the context ends; an error where none would fit."""
    if limit < 1:
        raise DeliberateError(
            f"the length limit leaves {limit} new tokens after a prompt of {prompt}: it must "
            "leave at least 1"
        )
    if context is None:
        return limit
    if prompt >= context:
        raise DeliberateError(
            f"the prompt has {prompt} tokens but the model's context is {context}: shorten it"
        )
    return min(limit, context - prompt)


def unpadded(ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The prompts ``[n_i]`` of a left-padded batch ``[B, n]``.

    Raises:
        DeliberateError: a mask of another shape, padding on the right, or an empty prompt.
    """
    if attention_mask is None:
        return list(ids)
    if attention_mask.shape != ids.shape:
        raise DeliberateError(
            f"attention_mask has shape {list(attention_mask.shape)}, the prompt {list(ids.shape)}"
        )
    prompts = []
    for row, (own, mask) in enumerate(zip(ids, attention_mask.tolist(), strict=True)):
        padding = len(mask) - sum(mask)
        if padding == len(mask):
            raise DeliberateError(
                f"the prompt is empty: attention_mask is 0 everywhere in row {row}"
            )
        if any(mask[:padding]):
            raise DeliberateError(
                f"attention_mask of prompt {row} has zeros after the first token: pad on the left"
            )
        prompts.append(own[padding:])
    return prompts


def _take_stop_strings(kwargs: dict[str, Any]) -> None:
    """Turns `stop_strings` into a criterion: transformers drops the tokenizer on our way."""
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config")
    strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not strings:
        return
    if tokenizer is None:
        raise DeliberateError(f"stop_strings={strings!r} need the tokenizer: pass tokenizer=...")
    if config is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    own = StopStringCriteria(tokenizer, strings)
    kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), own]


def _check_prompt(inputs: Tensor | None, kwargs: dict[str, Any], context: int | None) -> None:
    given = kwargs.get("input_ids")
    if (inputs is None) == (given is None):
        raise DeliberateError("give the prompt as `inputs` or as `input_ids`, one of the two")
    ids = given if inputs is None else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        dtype = ids.dtype if isinstance(ids, Tensor) else "-"
        raise DeliberateError(
            f"prompt ids have shape {shape} and dtype {dtype}: [B, n] of int64 is needed"
        )
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise DeliberateError("the prompt is empty: give at least one token")
    prompts = unpadded(ids, kwargs.get("attention_mask"))
    within_context(1, max(map(len, prompts)), context)


def _chooser(
    processors: LogitsProcessorList | None,
    config: GenerationConfig,
    seed: int | None,
    batch: int,
) -> TokenChooser:
    sample = bool(config.do_sample)
    if seed is None:
        # As in transformers, torch.manual_seed governs what is drawn.
        seed = int(torch.randint(2**62, ())) if sample else 0
    return TokenChooser(processors or (), sample=sample, seed=seed, batch=batch)


def _end_tokens(config: GenerationConfig) -> tuple[int, ...]:
    end = config.eos_token_id
    if end is None:
        return ()
    if isinstance(end, Tensor):
        return tuple(end.reshape(-1).tolist())
    return tuple(end) if isinstance(end, list | tuple) else (int(end),)


def _pad_token(config: GenerationConfig, ends: Sequence[int]) -> int:
    pad = config.pad_token_id
    if pad is not None:
        return int(pad)
    return ends[0] if ends else 0


def _own_criteria(
    criteria: StoppingCriteriaList | None, config: GenerationConfig, ends: Sequence[int]
) -> list[Any]:
    """Those that the loop does not hold by itself."""

    def held(criterion: Any) -> bool:
        if isinstance(criterion, MaxLengthCriteria):
            return config.max_length is not None and criterion.max_length >= config.max_length
        if isinstance(criterion, EosTokenCriteria):
            return set(criterion.eos_token_id.reshape(-1).tolist()) <= set(ends)
        return False

    return [criterion for criterion in criteria or () if not held(criterion)]


def _first_stop(
    ids: Sequence[int], fresh: int, criteria: Sequence[Any], device: torch.device
) -> int | None:
    """How many of the last `fresh` ids there are when a criterion holds, or None."""
    if not criteria:
        return None
    every = torch.tensor([list(ids)], device=device)
    for count in range(1, fresh + 1):
        prefix = every[:, : len(ids) - fresh + count]
        if any(bool(torch.as_tensor(criterion(prefix, None)).all()) for criterion in criteria):
            return count
    return None


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
