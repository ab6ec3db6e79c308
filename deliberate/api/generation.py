"""`generate` with transformers' conventions around the decode loop.

transformers itself prepares everything: `AdaptiveModel.generate` calls the wrapped model's own
`generate` with :class:`AdaptiveDecoding` as its ``custom_generate``, so generation configuration,
logits processors, stopping criteria, streamers and caches mean what they mean there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from deliberate.api.decodable import DecodableModel
from deliberate.api.generate_output import AdaptiveGenerateOutput, padded, scores_by_step
from deliberate.api.generation_args import check_arguments, check_config, check_model_inputs
from deliberate.api.generation_inputs import (
    DEFAULT_NEW_TOKENS,
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
from deliberate.api.images import Seen, seen_prompt, take_images
from deliberate.api.loop_builder import Extent, Hooks, build_loop
from deliberate.api.reasoned import ReasonedDecoding
from deliberate.api.stopping_criteria import StoppingSteps
from deliberate.api.structured import GrammarConstraint, StructuredOutput
from deliberate.api.training_mode import checkpointing_off
from deliberate.config import Fidelity
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import Decision, ExitPolicy
from deliberate.engine.spec import SPEC_FIELDS, DecodingSpec, spec_of
from deliberate.policies.budget import LatencyBudget, as_budget
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError


class AdaptiveDecoding:
    """How to decode; callable as transformers' ``custom_generate``.

        decode = AdaptiveDecoding(adaptive_model, fidelity="exact")
        stock_model.generate(**inputs, custom_generate=decode)

    Attributes:
        model: the adaptive model.
        spec: what is chosen about decoding.
        hooks: objects of the caller's that take part.
        budget: what fidelity ``budget`` is to meet, or None.

    Args:
        model: the adaptive model; the stock model that calls must be the one it wraps.
        fidelity, thresholds: of the spec.
        spec: a `DecodingSpec`; fields that have their default there may be given beside it.
        latency_budget: a `LatencyBudget`, a tier's name or ``{"ms_per_token": 2.5}``; fidelity
            ``budget``, which is taken to be meant where a budget is given.
        seed: of sampling; drawn from torch's generator where None.
        exit_policy, decide, monitor: see `Hooks`.
        structured: what every output must be: ``{"json_schema": ...}``, ``{"regex": ...}``,
            ``{"choice": [...]}`` or ``{"grammar": ...}``, see `StructuredOutput`.
        tokenizer: of the model; needed for `structured`.
        hand_over: write keys and values back into the caller's cache.
        streamer: gets accepted tokens. transformers 5 drops the ``streamer`` of a call
            with ``custom_generate`` after showing it the prompt, so it is named here.
        called: time of the call by `time.perf_counter`; a budget counts from there.
        seen: the prompts with the ids of their images.
        **settings: other fields of `DecodingSpec`, by name.

    Raises:
        DeliberateError: an unknown setting, one that is given twice, or a value that is not
            allowed.
    """

    def __init__(
        self,
        model: DecodableModel,
        fidelity: Fidelity | str | None = None,
        thresholds: float | Sequence[float] | None = None,
        *,
        spec: DecodingSpec | None = None,
        latency_budget: LatencyBudget | str | Mapping[str, float] | None = None,
        seed: int | None = None,
        exit_policy: ExitPolicy | str | Mapping[str, float] | None = None,
        decide: Decision | None = None,
        monitor: Callable[[int, int], None] | None = None,
        structured: StructuredOutput | Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        hand_over: bool = True,
        streamer: Any = None,
        called: float | None = None,
        seen: Seen | None = None,
        **settings: Any,
    ) -> None:
        for name in settings:
            if name not in SPEC_FIELDS:
                raise DeliberateError(
                    f"AdaptiveDecoding has no setting {name!r}; there is {', '.join(OWN_SETTINGS)}"
                )
        self.model = model
        self.spec = spec_of(spec, {"fidelity": fidelity, "thresholds": thresholds} | settings)
        self.budget = None if latency_budget is None else as_budget(latency_budget)
        self.hooks = Hooks(exit_policy, decide, monitor)
        self._structured = None if structured is None else StructuredOutput.of(structured)
        self._tokenizer = tokenizer
        self._seed = seed
        self._hand_over, self._streamer, self._called = hand_over, streamer, called
        self._seen = seen

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
            DeliberateError: an empty or too long prompt, or an unsupported way of decoding.
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
        streamer = self._streamer if streamer is None else streamer
        batch = input_ids.shape[0]
        if streamer is not None and batch > 1:
            raise DeliberateError(f"a streamer shows one sequence, the batch has {batch}")
        ends = end_tokens(config)
        pad = pad_token(config, ends)
        mask = model_kwargs.get("attention_mask")
        prompts = fed = unpadded(input_ids, mask, pad)
        if self._seen is not None:
            fed = unpadded(self._seen.repeated(batch), mask, pad)
            if self._seen.positions is not None and self._hand_over:
                raise DeliberateError(
                    "past_key_values with images at positions of M-RoPE: a cache does not hold "
                    "where they are; leave it out"
                )
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
            chooser=token_chooser(
                logits_processor, config, self._seed, batch, pad, together=self._together
            ),
            keep_scores=bool(config.output_scores and config.return_dict_in_generate),
            prompts=prompts,
            positions=None if self._seen is None else self._seen.place(mask),
            placed_rows=self._seen is not None and self._seen.by_ids,
        )
        cache = model_kwargs.get("past_key_values")
        with torch.inference_mode():
            held = from_transformers(
                cache,
                loop.backbone,
                [len(prompt) for prompt in prompts],
                limit,
                width=width,
                hand_over=self._hand_over,
                storage=self.spec.kv_storage,
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
            [prompt.to(device) for prompt in fed],
            prefixes=input_ids.tolist(),
            cache=held,
            called=self._called,
            keep_rows=self._hand_over and cache is not None,
        ):
            stops = stopping.stops(loop.sequences)
            for index, count in stops.items():
                loop.stop_at(count, index)
            if streamer is not None:
                handed = loop.sequences[0].yielded - len(freshes[0])
                for token in freshes[0][: stops.get(0, handed + len(freshes[0])) - handed]:
                    streamer.put(torch.tensor([token]))
        if isinstance(cache, Cache) and self._hand_over:
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
            past_key_values=cache if self._hand_over else None,
            trace=loop.trace if batch == 1 else None,
            traces=loop.traces,
            batch=loop.batch,
            budget=loop.exit_policy.report,
        )

    @property
    def _together(self) -> bool:
        """Whether the tokens of one index are chosen in one call for the whole batch."""
        fidelity = self.spec.fidelity or (None if self.budget else self.model.fidelity)
        return fidelity is Fidelity.DENSE

    def _constraints(self, ends: Sequence[int], batch: int) -> list[GrammarConstraint]:
        """One constraint of each sequence; none where the output is free."""
        if self._structured is None:
            return []
        vocabulary = self.model.backbone.vocab_size
        first = self._structured.constraint(self._tokenizer, ends, vocabulary)
        return [first, *(first.copy() for _ in range(batch - 1))]

    def loop(
        self, *, max_new_tokens: int, end_tokens: Collection[int], batch: int = 1, **extent: Any
    ) -> DecodeLoop:
        """A decode loop over the model; the arguments are those of `Extent`.

        Raises:
            DeliberateError: as `build_loop`.
        """
        constraints = self._constraints(list(end_tokens), batch)
        size = Extent(max_new_tokens, end_tokens, batch, constraints=constraints, **extent)
        return build_loop(self.model, self.spec, self.hooks, self.budget, size)


OWN_SETTINGS = (
    *SPEC_FIELDS,
    *("spec", "latency_budget", "seed", "exit_policy", "decide", "monitor", "structured"),
)


def generate(model: DecodableModel, inputs: Tensor | None = None, **kwargs: Any) -> Any:
    """Generates as `transformers` does, with early exits where their confidence allows it.

    Args:
        inputs: prompt ids ``[B, n]`` (also as ``input_ids=``), padded on the left.
        **kwargs: those of `AdaptiveDecoding` (spec, or fidelity, thresholds, kv_mode, ...;
            latency_budget, seed, exit_policy, structured, ...) and those of transformers'
            `generate` (attention_mask, generation_config, logits_processor, stopping_criteria,
            streamer, past_key_values, max_new_tokens, ...). Other ways of decoding
            (beams, contrastive search, ...) are refused by name. Of a vision-language model also
            what its processor gives (pixel_values, ...). ``reasoning`` and ``votes``:
            chains of reasoning that a stop policy ends early, and votes of several chains
            (`deliberate.reasoning.settings`, docs/reasoning.md); both need ``tokenizer``.

    Returns:
        Ids ``[B, n + new]``, prompts included, or `AdaptiveGenerateOutput` with
        ``return_dict_in_generate=True``.

    Raises:
        DeliberateError: an empty or too long prompt, an unknown or unsupported setting.
    """
    called = time.perf_counter()
    own = {name: kwargs.pop(name) for name in OWN_SETTINGS if name in kwargs}
    reasoning, votes = kwargs.pop("reasoning", None), kwargs.pop("votes", None)
    images = take_images(model.base, kwargs)
    check_arguments(kwargs, (*OWN_SETTINGS, "reasoning", "votes"))
    check_prompt(inputs, kwargs, model.backbone.learned_positions, model.generation_config)
    own["tokenizer"] = kwargs.get("tokenizer")
    take_stop_strings(kwargs)
    caches = ("past_key_values", "cache_implementation")
    hand_over = any(kwargs.get(name) is not None for name in caches)
    decoding: AdaptiveDecoding | ReasonedDecoding
    seen = seen_prompt(model, inputs, images, kwargs)
    if seen is not None and (reasoning is not None or votes is not None):
        raise DeliberateError("reasoning or votes with images: chains read text alone")
    if reasoning is not None or votes is not None:
        decoding = ReasonedDecoding(model, reasoning, votes, own, kwargs)
    else:
        decoding = AdaptiveDecoding(
            model,
            **own,
            hand_over=hand_over,
            streamer=kwargs.get("streamer"),
            called=called,
            seen=seen,
        )
    base: Any = model.base
    try:
        return base.generate(inputs, custom_generate=decoding, **kwargs)
    except DeliberateError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DeliberateError(f"generate: {lines[0] if lines else type(error).__name__}") from error
