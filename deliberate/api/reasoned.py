"""`generate(reasoning=..., votes=...)`: chains of reasoning with transformers' conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from deliberate.api.decodable import DecodableModel
from deliberate.api.generate_output import AdaptiveGenerateOutput
from deliberate.api.generation_args import check_config, check_model_inputs
from deliberate.api.generation_inputs import (
    DEFAULT_NEW_TOKENS,
    check_positions,
    own_criteria,
    pad_token,
    token_chooser,
    unpadded,
    within_context,
)
from deliberate.api.reasoner import Reasoner, Sampling
from deliberate.api.training_mode import checkpointing_off
from deliberate.config import Fidelity
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import SPEC_FIELDS, spec_of
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.settings import ReasoningSettings, VoteGroup
from deliberate.reasoning.vote_runner import VoteResult
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError

# Chains that are decoded at a time.
_RUNNING = 8
# Apart by more than an output has tokens, so that no two stretches of chains share a seed.
_SEEDS_APART = 1_000_003
_REFUSED = {
    "latency_budget": "a chain has no latency budget: limit its tokens, {'budget': 100} say",
    "exit_policy": "chains run in an engine, whose requests have their thresholds",
    "decide": "chains run in an engine, whose requests have their thresholds",
    "monitor": "chains run in an engine; read `chains` of the output",
    "structured": "the form would be that of the reasoning too: ask a server, or leave it out",
    "streamer": "a chain's tokens are known once its probes are: leave it out",
    "past_key_values": "an engine has keys and values of its own: leave it out",
    "cache_implementation": "an engine has keys and values of its own: leave it out",
    "output_scores": "chains keep no scores: leave it out",
}
# What chains cannot have, since they share a cache, and the value that says so.
_ENGINE_ONLY = {"drafts": None, "kv_storage": "native"}


class ReasonedDecoding:
    """Chains of reasoning; callable as transformers' ``custom_generate``.

    Args:
        model: the adaptive model.
        reasoning: a stop policy's name or `ReasoningSettings`, in any of their forms; None: the
            chains end by themselves.
        votes: a number of chains or a rule, under one budget of tokens or without one (as
            `VoteGroup.of` takes it); None: one chain of each prompt.
        own: this package's arguments of `generate`.
        given: those of transformers.

    Raises:
        DeliberateError: an argument that cannot be combined with these, by name.
    """

    def __init__(
        self,
        model: DecodableModel,
        reasoning: Any,
        votes: Any,
        own: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        for name, reason in _REFUSED.items():
            value = own.get(name, given.get(name))
            if value is not None and value is not False:
                raise DeliberateError(f"{name} with {_named(reasoning, votes)}: {reason}")
        self.model = model
        self.settings = ReasoningSettings.of("none" if reasoning is None else reasoning)
        self.votes = None if votes is None else VoteGroup.of(votes)
        self._called = _named(reasoning, votes)
        chosen = {name: own[name] for name in SPEC_FIELDS if name in own}
        self.spec = spec_of(own.get("spec"), chosen)
        fidelity = self.spec.fidelity or model.fidelity
        if fidelity in (Fidelity.CERTIFIED, Fidelity.BUDGET):
            raise DeliberateError(
                f"fidelity {str(fidelity)!r} with {self._called}: its calibration is of whole "
                "outputs; use dense, exact or threshold"
            )
        for name, plain in _ENGINE_ONLY.items():
            value = getattr(self.spec, name)
            if value is not None and value != plain:
                raise DeliberateError(
                    f"{name}={str(value)!r} with {self._called}: chains run in an engine, whose "
                    f"requests share one cache: leave {name} out"
                )
        self._tokenizer = own.get("tokenizer")
        self._seed = own.get("seed")

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
        """Decodes what transformers has prepared.

        Raises:
            DeliberateError: something that chains cannot obey, by name.
        """
        config = generation_config or GenerationConfig()
        check_config(config)
        model_kwargs.pop("past_key_values", None)  # that transformers has made
        check_model_inputs(model_kwargs)
        ends = end_tokens(config)
        pad = pad_token(config, ends)
        other = own_criteria(stopping_criteria, config, ends)
        if other:
            raise DeliberateError(
                f"{type(other[0]).__name__} with {self._called}: a chain ends by its policy and "
                "limits; leave stopping criteria, stop_strings and max_time out"
            )
        if self.votes is not None and (config.num_return_sequences or 1) > 1:
            raise DeliberateError(
                f"num_return_sequences={config.num_return_sequences} with {self._called}: the "
                "chains of a vote are in `votes` of the output; leave it out"
            )
        if self.votes is not None and not config.do_sample:
            raise DeliberateError(
                f"{self._called} without do_sample=True: greedy chains are all the same"
            )
        mask = model_kwargs.get("attention_mask")
        rows = [prompt.tolist() for prompt in unpadded(input_ids, mask, pad)]
        check_positions(model_kwargs.get("position_ids"), mask, input_ids)
        width, longest = input_ids.shape[1], max(map(len, rows))
        wanted = (config.max_length or width + DEFAULT_NEW_TOKENS) - width
        limit = within_context(wanted, longest, self.model.backbone.learned_positions)
        seed = self._seed
        if seed is None:  # as in transformers, torch.manual_seed governs what is drawn
            seed = int(torch.randint(2**62, ())) if config.do_sample else 0
        plain = token_chooser(logits_processor, config, seed, 1, pad).plain

        def sampling(chain: int, start: int) -> TokenChooser:
            return token_chooser(
                logits_processor, config, seed + _SEEDS_APART * chain + start, 1, pad
            )

        drawn: Sampling | None = None if plain else sampling
        with checkpointing_off(self.model.backbone.layers):
            reasoner = Reasoner(
                self.model,
                self._tokenizer,
                self.settings,
                end_tokens=ends,
                longest=longest + limit + 32,
                running=_RUNNING,
            )
            votes = None
            if self.votes is None:
                chains = reasoner.run(rows, limit, spec=self.spec, sampling=drawn)
            else:
                votes = []
                for at, row in enumerate(rows):
                    first = at * self.votes.rule.most

                    def own(chain: int, start: int, first: int = first) -> TokenChooser:
                        return sampling(first + chain, start)

                    votes.append(reasoner.vote(row, limit, self.votes, own, spec=self.spec))
                chains = [elected(vote) for vote in votes]
        sequences = _padded(input_ids, chains, pad)
        if not config.return_dict_in_generate:
            return sequences
        return AdaptiveGenerateOutput(
            sequences=sequences,  # type: ignore[arg-type]
            chains=chains,
            votes=votes,
        )


def elected(vote: VoteResult) -> ChainResult:
    """The first chain that gives the answer of a vote; the first of all where none gives one."""
    return next((one for one in vote.chains if one.answer == vote.answer), vote.chains[0])


def _named(reasoning: Any, votes: Any) -> str:
    return "reasoning=" if votes is None else "votes="


def _padded(input_ids: Tensor, chains: list[ChainResult], pad: int) -> Tensor:
    """Prompts and outputs ``[B, n + new]``, finished rows padded at the end."""
    width = max(len(chain.tokens) for chain in chains)
    rows = [chain.tokens + [pad] * (width - len(chain.tokens)) for chain in chains]
    return torch.cat((input_ids, torch.tensor(rows, device=input_ids.device)), dim=1)
