"""Log-probabilities in an engine are those of a plain full forward by transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixed_requests import SPECS, Unsteady, alone, draw_request
from rhythm import Forcing
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

LAYERS = 6


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=LAYERS), [1, 2, 4])


def answers(engine, requests):
    """By request, its tokens, layers and log-probabilities."""
    numbers = [engine.add(one) for one in requests]
    made = {number: ([], [], []) for number in numbers}
    while engine.unfinished:
        for output in engine.step():
            for kept, new in zip(
                made[output.id], (output.tokens, output.exit_layers, output.logprobs), strict=True
            ):
                kept.extend(new)
    return [made[number] for number in numbers]


@torch.no_grad()
def expected(model, prompt, tokens, layers):
    """Log-probabilities ``[T, V]`` by transformers: of full depth, or of the exit's head."""
    ids = torch.tensor([[*prompt, *tokens]])
    made = model.base(ids, output_hidden_states=True)
    states = [model.base.lm_head(model.base.model.norm(h)) for h in made.hidden_states[:-1]]
    rows = []
    for index, layer in enumerate(layers):
        logits = made.logits if layer in (0, LAYERS) else states[layer]
        rows.append(logits[0, len(prompt) + index - 1])
    return torch.stack(rows).log_softmax(-1)


def check(model, request, tokens, layers, logprobs) -> None:
    assert len(logprobs) == len(tokens)
    exact = request.spec.fidelity == "exact"
    rows = expected(model, request.prompt_ids, tokens, [LAYERS] * len(tokens) if exact else layers)
    for token, row, one in zip(tokens, rows, logprobs, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-5)
        best = row.topk(request.top_logprobs)
        assert [number for number, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_they_are_those_of_a_plain_forward_in_every_mode_beside_others_and_preempted(llama):
    kinds = [0, 1, 2, 3, 4, 5]  # those that compute every token's keys and values exactly
    requests = []
    for seed in range(48):
        spec = DecodingSpec(**SPECS[kinds[seed % len(kinds)]])
        top = None if seed % 8 == 7 else seed % 4
        requests.append(dataclasses.replace(draw_request(seed), spec=spec, top_logprobs=top))
    engine = llama.engine(max_running=5, scheduler=Unsteady(3, 0.1, max_running=5))
    exits = 0
    for request, (tokens, layers, logprobs) in zip(
        requests, answers(engine, requests), strict=True
    ):
        assert tokens == alone(llama, request)[0]  # asking for them changes no token
        if request.top_logprobs is None:
            assert not logprobs
        else:
            check(llama, request, tokens, layers, logprobs)
            exits += sum(layer < LAYERS for layer in layers)
    assert exits > 20 and engine.stats().preempted > 5


class Counting(Forcing):
    """Every second token is forced; all others are even."""

    def forced(self) -> list[int]:
        return [] if len(self.tokens) % 2 else [len(self.tokens) + 1]

    def _free(self, tokens):
        return tokens % 2 == 0


@pytest.mark.parametrize("kind", [0, 1, 4])
def test_a_constraint_changes_the_tokens_and_not_what_the_model_thinks_of_them(llama, kind):
    plain = dataclasses.replace(
        draw_request(kind), spec=DecodingSpec(**SPECS[kind]), max_new_tokens=14, end_tokens=()
    )
    ((without, _, _),) = answers(
        llama.engine(), [dataclasses.replace(plain, constraint=Counting())]
    )
    asked = dataclasses.replace(plain, constraint=Counting(), top_logprobs=3)
    ((tokens, layers, logprobs),) = answers(llama.engine(), [asked])
    assert len(tokens) == 14 and all(
        token == at + 1 for at, token in enumerate(tokens) if at % 2 == 0
    )
    if kind != 4:  # an unverified token that is forced exits nowhere else than one that is run
        assert tokens == without
    check(llama, asked, tokens, layers, logprobs)


def test_a_number_of_alternatives_that_cannot_be_is_one_line(llama):
    with pytest.raises(DeliberateError, match="top_logprobs -1 must be a whole number from 0"):
        dataclasses.replace(draw_request(0), top_logprobs=-1)
