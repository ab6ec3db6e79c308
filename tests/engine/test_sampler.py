"""Sampling: exact mode draws what dense draws, and the coupling's distribution is the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_models import random_ids, tiny_model
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from deliberate.api.model import AdaptiveModel
from deliberate.engine.sampler import TokenChooser

DRAWS = 20_000
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05, "temperature": 1.2},
    {"repetition_penalty": 1.5, "top_k": 20, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4), [1, 2])


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_exact_draws_the_same_tokens_as_dense_with_the_same_seed(model, settings):
    ids = random_ids(6, seed=2).repeat(4, 1)
    common = {"do_sample": True, "max_new_tokens": 20, "seed": 5} | settings
    dense = model.generate(ids, fidelity="dense", **common)
    exact = model.generate(
        ids,
        fidelity="exact",
        thresholds=0.013,
        online=False,
        return_dict_in_generate=True,
        **common,
    )
    assert torch.equal(exact.sequences, dense)
    assert sum(trace.drafted for trace in exact.traces) > 20
    assert sum(trace.rejected for trace in exact.traces) > 0
    assert len({tuple(row) for row in dense.tolist()}) > 1
    assert not torch.equal(dense, model.generate(ids, fidelity="dense", **(common | {"seed": 6})))


def test_draws_without_a_seed_use_the_default_generator_of_torch(model):
    ids = random_ids(6)
    settings = {"do_sample": True, "max_new_tokens": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = model.generate(ids, **settings)
        other = model.generate(ids, **settings)
        torch.manual_seed(3)
        assert torch.equal(first, model.generate(ids, **settings))
    assert not torch.equal(first, other)


# -- goodness of fit -------------------------------------------------------------------------------


def drafted_then_verified(draft: torch.Tensor, full: torch.Tensor, chooser, index: int) -> int:
    """What exact mode emits: the draft where the full depth agrees, else the full depth's token."""
    proposed, _ = chooser.choose(draft, [0], 0, index)
    answer, _ = chooser.choose(full, [0], 0, index)
    return proposed if proposed == answer else answer


def accepted_if_likely(draft: torch.Tensor, full: torch.Tensor, chooser, index: int) -> int:
    """A wrong rule: a draft is accepted wherever full depth finds it likely enough."""
    proposed, _ = chooser.choose(draft, [0], 0, index)
    if torch.softmax(full, dim=-1)[proposed] > 0.1:
        return proposed
    return chooser.choose(full, [0], 0, index)[0]


def fit(rule) -> float:
    """p-value that the tokens of `rule` follow the full depth's processed distribution."""
    generator = torch.Generator().manual_seed(0)
    full = 1.5 * torch.randn(12, generator=generator)
    draft = full + 0.7 * torch.randn(12, generator=generator)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(8)])
    chooser = TokenChooser(warpers, sample=True, seed=1)
    counts = np.zeros(12)
    for index in range(DRAWS):
        counts[rule(draft, full, chooser, index)] += 1
    expected = torch.softmax(warpers(torch.zeros(1, 1), full.unsqueeze(0))[0], dim=-1).double()
    possible = expected.numpy() > 0
    assert counts[~possible].sum() == 0
    scaled = expected.numpy()[possible]
    return chisquare(counts[possible], DRAWS * scaled / scaled.sum()).pvalue


def test_exact_mode_follows_the_dense_distribution():
    assert fit(drafted_then_verified) > 1e-3


def test_the_same_test_detects_a_wrong_acceptance_rule():
    assert fit(accepted_if_likely) < 1e-6


def test_whole_generations_follow_the_dense_distribution(model):
    """Pairs of tokens of exact mode, drafts and rollbacks included, against dense probabilities."""
    ids = random_ids(4, seed=1)
    rows, settings = 500, {"do_sample": True, "top_k": 3, "max_new_tokens": 3}
    with torch.inference_mode():
        first = torch.softmax(model.base(ids).logits[0, -1].float().topk(3).values, -1)
        tops = model.base(ids).logits[0, -1].topk(3).indices
        expected: dict[tuple[int, int], float] = {}
        for share, token in zip(first.tolist(), tops.tolist(), strict=True):
            logits = model.base(torch.cat((ids, torch.tensor([[token]])), 1)).logits[0, -1].float()
            values, indices = logits.topk(3)
            for own, second in zip(
                torch.softmax(values, -1).tolist(), indices.tolist(), strict=True
            ):
                expected[token, second] = share * own
    counts = dict.fromkeys(expected, 0)
    drafted = 0
    for seed in range(4):
        out = model.generate(
            ids.repeat(rows, 1),
            fidelity="exact",
            thresholds=0.013,
            online=False,
            seed=seed,
            return_dict_in_generate=True,
            **settings,
        )
        drafted += sum(trace.drafted for trace in out.traces)
        for pair in out.sequences[:, 4:6].tolist():
            counts[tuple(pair)] += 1
    assert drafted > rows
    shares = np.array([expected[pair] for pair in counts])
    observed = np.array(list(counts.values()))
    assert chisquare(observed, observed.sum() * shares / shares.sum()).pvalue > 1e-3
