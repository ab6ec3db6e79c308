"""What answers are kept under follows the model, without a look at every weight each time."""

from __future__ import annotations

import math

import torch
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.serving.served_version import ModelIdentity


def test_a_change_by_torch_shows_at_once_and_one_behind_its_back_soon() -> None:
    model = AdaptiveModel(tiny_model("llama"), exits=(1, 2))
    identity = ModelIdentity(model)
    weight = model.base.get_output_embeddings().weight
    seen = [identity.recent()]
    assert identity.recent() == seen[0] == identity()
    with torch.no_grad():
        weight.mul_(2.0)
    seen.append(identity.recent())
    model.set_exit_config(model.exit_config.with_thresholds((0.5, 0.25)))
    seen.append(identity.recent())
    weight.data = weight.detach() * 2.0
    identity._until = -math.inf  # 50 ms later
    seen.append(identity.recent())
    assert len(set(seen)) == 4 and seen[-1] == identity()


def test_the_weights_are_not_looked_at_for_each_request(monkeypatch) -> None:
    model = AdaptiveModel(tiny_model("llama"), exits=(1, 2))
    identity, looks = ModelIdentity(model), []
    whole = ModelIdentity.__call__

    def counted(self) -> str:
        looks.append(1)
        return whole(self)

    monkeypatch.setattr(ModelIdentity, "__call__", counted)
    monkeypatch.setattr("deliberate.serving.served_version._RECENT", 60.0)
    assert len({identity.recent() for _ in range(50)}) == 1 and len(looks) == 1
