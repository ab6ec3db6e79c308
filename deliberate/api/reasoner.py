"""Chains of reasoning of one model: marks, limits and policies put together for its engine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from deliberate.api.chain_conditions import chain_conditions, model_folder
from deliberate.api.decodable import DecodableModel
from deliberate.api.model_engine import build_engine
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import (
    ReasoningMarks,
    begun_in,
    blank_tokens,
    marks_of,
    reasoning_tags,
    utf8_ends,
)
from deliberate.reasoning.own_calibration import completed
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.settings import ReasoningSettings, VoteGroup
from deliberate.reasoning.vote_runner import VoteResult, run_votes
from deliberate.utils.errors import DeliberateError

# Tokens of a block of keys and values, of which probes and the chains of a vote share prefixes.
_BLOCK = 16
# Text before the answer in outputs of models that were trained on a mark (`answer_mark`).
_LEAD_INS = {"gsm8k": "\n#### ", "boxed": "\n\\boxed{"}
# How the logits of chain i become tokens, from token `start` of its output on.
Sampling = Callable[[int, int], TokenChooser]


class Reasoner:
    """Runs chains and votes of one model.

    Args:
        model: that reasons.
        tokenizer: of it.
        settings: of the reasoning.
        end_tokens: that end an output, at least one.
        longest: tokens of a prompt and its output together, at most.
        running: chains that are decoded at a time.
        conditions: what is known of the prompts besides, by the names of
            `deliberate.calibration.conditions`, such as the task.
        check: called before every step of the engine; what it raises ends the call, after which
            this object cannot be used.

    Attributes:
        settings: as given.

    Raises:
        DeliberateError: no tokenizer, or a model that is not known to mark its reasoning.
    """

    def __init__(
        self,
        model: DecodableModel,
        tokenizer: Any,
        settings: ReasoningSettings,
        *,
        end_tokens: Collection[int],
        longest: int,
        running: int = 8,
        conditions: Mapping[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if tokenizer is None:
            raise DeliberateError("reasoning needs the tokenizer: pass tokenizer=...")
        self.settings = settings
        self._model = model
        self._check = check
        self._conditions = dict(conditions or {})
        self._tokenizer = tokenizer
        self._ends = tuple(end_tokens)
        self._marks = marks_for(model, tokenizer, settings)
        self._utf8 = utf8_ends(tokenizer)
        self._blank = blank_tokens(tokenizer, model.backbone.vocab_size)
        cache = model.backbone_for(2).new_block_cache(
            running * (math.ceil(longest / _BLOCK) + 2), block_size=_BLOCK, max_rows=running
        )
        scheduler = Scheduler(SchedulerSettings(max_running=running, block_tokens=_BLOCK))
        self._engine = build_engine(model, max_running=running, cache=cache, scheduler=scheduler)
        self._runners: dict[ReasoningMarks, ChainRunner] = {}
        self._ids: dict[str, list[int]] = {}
        self._fingerprints = model.fingerprints

    @property
    def lead_in(self) -> str:
        """Text that a forced answer follows, the closing mark of a model without tags included."""
        marks = self._marks
        return self.decode(marks.handover if not marks.reopening else marks.answer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens; every chain's policy asks for the same few."""
        if text not in self._ids:
            self._ids[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return list(self._ids[text])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        spec: DecodingSpec | None = None,
        sampling: Sampling | None = None,
        heard: Callable[[int, Sequence[int]], None] = lambda *_: None,
    ) -> list[ChainResult]:
        """One chain of each prompt; those that begin their reasoning alike run together.

        Args:
            prompts: token ids.
            max_new_tokens: of each output.
            spec: how it is decoded.
            sampling: of chain i, the index of its prompt; None for greedy decoding.
            heard: called with i and chain i's output so far whenever it goes on or is probed. Only
                the policy ``rollback`` ever rolls tokens back.
        """
        made: dict[int, ChainResult] = {}
        groups: dict[ReasoningMarks, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(self._begun(prompt), []).append(index)
        with self._constant_weights():
            for marks, group in groups.items():
                requests = [
                    replace(
                        self.request(prompts[index], max_new_tokens, spec, sampling, index),
                        heard=functools.partial(heard, index),
                    )
                    for index in group
                ]
                made |= dict(zip(group, self._runner(marks).run(requests), strict=True))
        return [made[index] for index in range(len(prompts))]

    def vote(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        votes: VoteGroup,
        sampling: Sampling,
        *,
        spec: DecodingSpec | None = None,
        answer_of: Callable[[ChainResult], str] = lambda result: result.answer,
    ) -> VoteResult:
        """A vote of chains of one prompt; the arguments are those of `run` and `run_votes`.

        Answers are equal where the settings of the reasoning say so.
        """
        with self._constant_weights():
            return run_votes(
                self._runner(self._begun(prompt)),
                lambda number: self.request(prompt, max_new_tokens, spec, sampling, number),
                votes.rule,
                answer_of=answer_of,
                same=self.settings.same,
                max_tokens=votes.tokens,
            )

    def request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        spec: DecodingSpec | None,
        sampling: Sampling | None,
        number: int,
    ) -> ChainRequest:
        """Chain `number` of a prompt, with a policy of its own."""
        spec = spec or DecodingSpec()
        fidelity = spec.fidelity or self._model.fidelity
        spec = replace(spec, fidelity=fidelity)
        limits = self.settings.limits(max_new_tokens, self.encode)
        known = chain_conditions(
            self._model,
            self._begun(prompt),
            limits,
            fidelity,
            sampled=sampling is not None,
        )
        model = self._model
        policies = completed(
            self.settings.policies,
            model_folder(model),
            self._fingerprints,
            {**self._conditions, **known},
        )
        return ChainRequest(
            prompt,
            limits,
            self.settings.policy(self.encode, policies),
            spec,
            None if sampling is None else lambda start: sampling(number, start),
        )

    @contextmanager
    def _constant_weights(self) -> Iterator[None]:
        """Within, weights are hashed once, not for every chain."""
        with self._engine.constant_weights():
            self._fingerprints = functools.cache(self._model.fingerprints)
            try:
                yield
            finally:
                self._fingerprints = self._model.fingerprints

    def _begun(self, prompt: Sequence[int]) -> ReasoningMarks:
        return begun_in(self._marks, prompt, self._blank, chat=False)

    def _runner(self, marks: ReasoningMarks) -> ChainRunner:
        if marks not in self._runners:
            self._runners[marks] = ChainRunner(
                self._engine,
                marks,
                self.decode,
                end_tokens=self._ends,
                ends=self._utf8,
                blank=self._blank,
                check=self._check,
            )
        return self._runners[marks]


def marks_for(model: Any, tokenizer: Any, settings: ReasoningSettings) -> ReasoningMarks:
    """The marks around a model's reasoning.

    They are those of the settings, else the model's tags, else, in a model that was trained on a
    mark before its answers, that mark: its outputs begin with reasoning.

    Raises:
        DeliberateError: none of these is known.
    """
    config = model.base.config
    lead_in = _LEAD_INS.get(str(getattr(config, "answer_mark", None)), "")
    tags = settings.tags or reasoning_tags(tokenizer, config)
    if tags is None and lead_in:
        return marks_of(tokenizer, open_tag=None, close_tag=lead_in)
    if tags is None:
        raise DeliberateError(
            "this model is not known to mark its reasoning: give its tags, "
            'reasoning={"probe": {}, "tags": ("<think>", "</think>")} in Python, '
            "--reasoning-tags to `generate` or a server, reasoning_tags= to an evaluation"
        )
    opening, closing = tags
    if closing == lead_in:
        lead_in = ""
    return marks_of(
        tokenizer,
        open_tag=opening or None,
        close_tag=closing,
        answer=lead_in if settings.lead_in is None else settings.lead_in,
    )
