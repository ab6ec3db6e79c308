"""An architecture is one entry: with it, a model of it decodes; without it, it is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.architectures import ARCHITECTURES, Architecture, Attention
from deliberate.utils.errors import DeliberateError

NEW = {
    "olmo": Architecture(),
    "starcoder2": Architecture(attention=Attention.ONE_WINDOW),
}


@pytest.mark.parametrize("name", NEW)
def test_one_entry_makes_an_architecture_decode_as_transformers_does(name, monkeypatch) -> None:
    settings = {"sliding_window": 8} if name == "starcoder2" else {}
    base = tiny_model(name, layers=6, **settings)
    ids = random_ids(9)
    plain = base.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    with pytest.raises(DeliberateError, match=f"'{name}' is not supported; supported: bitnet"):
        AdaptiveModel(base, [2, 4])
    monkeypatch.setitem(ARCHITECTURES, name, NEW[name])
    model = AdaptiveModel(base, [2, 4])
    assert model.executor.startswith(f"generic: architecture {name}")
    for fidelity in ("dense", "exact"):
        made = model.generate(ids, max_new_tokens=16, fidelity=fidelity, thresholds=0.02)
        assert torch.equal(made, plain), fidelity
    with pytest.raises(DeliberateError, match=f"cannot run this model: architecture {name} is not"):
        AdaptiveModel(base, [2, 4], executor="fused")
