"""The layers that a student keeps are those that cost least together, fitted."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.modeling.layer_choice import best_layers, segment_costs
from deliberate.modeling.layer_fit import fit_layers
from deliberate.modeling.pruning import keep_layers
from deliberate.utils.errors import DeliberateError

TEXTS = [random_ids(40, seed=one)[0].tolist() for one in range(30)]
JUDGED = [
    (ids[:12], ids[12:]) for ids in (random_ids(32, seed=one)[0].tolist() for one in (90, 91))
]


def test_layers_that_do_nothing_can_be_left_to_the_one_before_them():
    base = tiny_model("llama", layers=5).float()
    with torch.no_grad():
        for number in (1, 2):  # layers 2 and 3 add nothing to the residual stream
            base.model.layers[number].mlp.down_proj.weight.zero_()
            base.model.layers[number].self_attn.o_proj.weight.zero_()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    said = []
    costs = segment_costs(base, TEXTS, JUDGED, most=3, tell=said.append)
    assert set(costs) == {(a, b) for a in range(1, 6) for b in range(a + 1, min(5, a + 2) + 1)}
    assert costs[1, 3] == pytest.approx(0, abs=1e-4) and costs[3, 4] > 1e-3
    assert best_layers(costs, 5, 3)[0] == [1, 4, 5] and len(said) == 4
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_a_segment_costs_what_a_student_without_it_diverges_by():
    """A student with one gap is exactly what is measured, but for the first position's state."""
    base = tiny_model("llama", layers=3).float()
    costs = segment_costs(base, TEXTS, JUDGED, most=2)
    student = keep_layers(base, [1, 3]).eval()
    fit_layers(student, base, [1, 3], TEXTS)
    # The layer behind the gap is fitted too in a student: set it back.
    student.model.layers[1].load_state_dict(base.model.layers[2].state_dict())
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, answer in JUDGED:
            ids = torch.tensor([prompt + answer])
            own, known = (
                model(ids).logits[0, len(prompt) - 1 : -1 : 2].log_softmax(-1)
                for model in (student, base)
            )
            total += float((known.exp() * (known - own)).sum())
            count += len(known)
    assert costs[1, 2] == pytest.approx(total / count, rel=0.2)


@given(st.lists(st.floats(0, 5), min_size=15, max_size=15), st.integers(1, 6))
def test_no_other_layers_cost_less(values, count):
    depth = 6
    pairs = [(a, b) for a in range(1, depth + 1) for b in range(a + 1, depth + 1)]
    costs = dict(zip(pairs, values, strict=True))

    def cost_of(layers):
        ends = [*(one - 1 for one in layers[1:]), depth]
        return sum(costs.get((a, b), 0.0) for a, b in zip(layers, ends, strict=True))

    layers, cost = best_layers(costs, depth, count)
    others = [[1, *rest] for rest in combinations(range(2, depth + 1), count - 1)]
    assert len(layers) == count and cost == pytest.approx(cost_of(layers))
    assert cost <= min(map(cost_of, others)) + 1e-9


def test_too_few_layers_for_what_was_measured_are_refused():
    costs = {(1, 2): 0.1, (2, 3): 0.1, (3, 4): 0.1}
    assert best_layers(costs, 4, 2) == ([1, 3], 0.2)
    with pytest.raises(DeliberateError, match="1 layers cannot stand for 4: keep more"):
        best_layers(costs, 4, 1)
