"""The rows of a generation are requests of an engine."""

from __future__ import annotations

import pytest
import torch

from deliberate.api.model import AdaptiveModel
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request


def test_every_row_of_a_generation_is_a_request_of_an_engine(monkeypatch):
    model = AdaptiveModel.from_pretrained("tiny", executor="generic")
    added: list[tuple[Engine, Request]] = []
    add = Engine.add

    def noted(engine: Engine, request: Request) -> int:
        added.append((engine, request))
        return add(engine, request)

    monkeypatch.setattr(Engine, "add", noted)
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, fidelity="exact", return_dict_in_generate=True
    )
    assert [list(request.prompt_ids) for _, request in added] == [[5, 6], [7, 8, 9, 10]]
    assert len({id(engine) for engine, _ in added}) == 1
    engine = added[0][0]
    assert engine.unfinished == 0 and engine.stats().added == len(out.traces) == 2
    with pytest.raises(RuntimeError, match="stepped by advance"):
        engine.step()
