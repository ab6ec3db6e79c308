"""Public outputs of reasoning models for `deliberate bench chains outputs=FILE`.

A probe answers what the text has stated up to there (``probes=stated``), or what another model says
that reads the chain so far (``probes=model``): the model that wrote it is rarely at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.eval.benchmarks.chain_setup import places_of, runner_of
from deliberate.eval.benchmarks.harness import UNBOUNDED, load_model
from deliberate.eval.benchmarks.settings import mapped
from deliberate.eval.grading.answers import extract_answer, stated_answer
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_recorder import RecordProbes
from deliberate.reasoning.marks import marks_of
from deliberate.reasoning.public_chains import (
    Output,
    OutputFields,
    read_outputs,
    recorded_output,
    stated_probes,
)
from deliberate.reasoning.recorded_chains import (
    ChainSet,
    ProbePlaces,
    RecordedProbe,
    RecordingHeader,
)
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.utils.checks import one_of
from deliberate.utils.errors import DeliberateError

STATED, MODEL = "stated", "model"
# What a model that reads the chain is made to go on from.
_BOX = "\\boxed{"
_HANDOVER = "\n\nThe final answer is "
_AT_A_TIME = 2


def public_chains(cfg: DictConfig) -> tuple[ChainSet, Callable[[str], Sequence[int]]]:
    """The chains of ``cfg.outputs``, with probes, and ids of a text.

    Raises:
        DeliberateError: a file that cannot be read, lines without the fields, or no chain that is
            short enough.
    """
    one_of("probes", cfg.probes, (STATED, MODEL))
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    keys = mapped(cfg, "fields")
    outputs = read_outputs(
        Path(str(cfg.outputs)).expanduser(),
        OutputFields(**keys),
        lambda text: extract_answer(text, "auto") or "",
    )
    every = [(output, encode(output.reasoning)) for output in outputs[: cfg.limit]]
    taken = [one for one in every if cfg.longest is None or len(one[1]) <= cfg.longest]
    if not taken:
        raise DeliberateError(f"longest={cfg.longest}: none of {len(every)} chains is as short")
    places = places_of(cfg)
    if cfg.probes == MODEL:
        probes = _asked(cfg, tokenizer, encode, taken, places)
    else:
        probes = [
            stated_probes(tokens, places, encode, tokenizer.decode, stated_answer)
            for _, tokens in taken
        ]
    chains = tuple(
        recorded_output(output, encode, found)
        for (output, _), found in zip(taken, probes, strict=True)
    )
    note = f"{cfg.outputs}, {len(taken)} of {len(every)} chains, probes: {cfg.probes}"
    return ChainSet(RecordingHeader(model=note, places=places), chains), encode


def _asked(
    cfg: DictConfig,
    tokenizer: Any,
    encode: Callable[[str], list[int]],
    taken: Sequence[tuple[Output, list[int]]],
    places: ProbePlaces,
) -> list[list[RecordedProbe]]:
    """What ``cfg.model`` answers that has read a chain up to each place, one chain at a time."""
    model = load_model(cfg)
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED)
    prompts = [encoder.prompt(output.question) for output, _ in taken]
    marks = marks_of(tokenizer, open_tag=None, close_tag=_HANDOVER, answer=_BOX, prompt="")
    beside = len(marks.handover) + places.answer_tokens
    longest = max(
        len(prompt) + len(tokens) + beside
        for prompt, (_, tokens) in zip(prompts, taken, strict=True)
    )
    context = getattr(model.base.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise DeliberateError(
            f"longest={cfg.longest}: a chain with its prompt has {longest} tokens, the context of "
            f"{cfg.model} {context}; give a lower one"
        )
    runner = runner_of(model, tokenizer, marks, _AT_A_TIME + 1, 2 * longest + 4096)
    found: list[list[RecordedProbe]] = []
    for prompt, (_, tokens) in tqdm(
        list(zip(prompts, taken, strict=True)), desc="asking", leave=False
    ):
        request = ChainRequest(prompt, BudgetSettings(len(tokens) + beside + 1))
        result = ChainResult(tokens=[*tokens, *marks.closing])
        due = RecordProbes(places, encode).due
        runner.probe([request], [result], due, places.answer_tokens, in_flight=_AT_A_TIME)
        probes = {
            one.at: RecordedProbe(one.at, _boxed(one.answer), one.confidence, one.tokens)
            for one in result.probes
            if one.at <= len(tokens)
        }
        found.append([probes[at] for at in sorted(probes)])
    return found


def _boxed(text: str) -> str:
    """The answer in what follows the opening of a box; empty where it was not closed."""
    return stated_answer(_BOX + text) or ""
