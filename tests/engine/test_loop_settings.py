"""Settings of the decode loop: validated when built, obeyed while decoding."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity, KVMode
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import CallablePolicy, MonitoredPolicy
from deliberate.engine.loop_settings import LoopSettings
from deliberate.utils.errors import DeliberateError

GIVEN = {
    "exits": (1, 2),
    "thresholds": (0.5, 0.5),
    "fidelity": Fidelity.THRESHOLD,
    "max_pending": 4,
    "max_new_tokens": 30,
}


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), [1, 2])


def decode(model: AdaptiveModel, **changes) -> DecodeLoop:
    policy = changes.pop("exit_policy", None)
    settings = LoopSettings(**GIVEN | changes)
    loop = DecodeLoop(model.backbone, model.reader(), settings, exit_policy=policy)
    list(loop.run(random_ids(5)))
    return loop


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fidelity": Fidelity.BUDGET}, "fidelity 'budget' in the decode loop: use"),
        ({"fidelity": Fidelity.CERTIFIED}, "fidelity 'certified' in the decode loop: use"),
        ({"max_pending": 0}, "max_pending 0: it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: it must be at least 1"),
        ({"thresholds": (0.5,)}, "1 thresholds for 2 exits: give one per exit"),
        ({"thresholds": (0.5, math.nan)}, "contain NaN"),
        ({"fidelity": Fidelity.EXACT, "kv_mode": KVMode.SKIP}, "'skip' with fidelity 'exact'"),
        ({"fidelity": Fidelity.EXACT, "kv_mode": KVMode.PROPAGATE}, "use 'defer'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(wrong, words):
    with pytest.raises(DeliberateError) as caught:
        LoopSettings(**GIVEN | wrong)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_settings_cannot_be_changed_and_dense_has_no_exits():
    settings = LoopSettings(**GIVEN | {"fidelity": Fidelity.DENSE})
    assert settings.exits == settings.thresholds == () and not settings.exact
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.max_pending = 3


@pytest.mark.parametrize(("every", "offset"), [(1, 0), (2, 0), (3, 0), (3, 2), (100, 1)])
def test_the_monitor_compares_at_every_so_many_deep_passes_from_its_offset_on(model, every, offset):
    exits = itertools.cycle([True, False])
    calls: list[tuple[int, int]] = []
    policy = MonitoredPolicy(
        CallablePolicy(lambda k, *_: k == 0 and next(exits)),
        lambda agreed, compared: calls.append((agreed, compared)),
        every,
        offset,
    )
    loop = decode(model, exit_policy=policy)
    deep = sum(one.segment == 2 for one in loop.batch.passes)
    assert deep > 6
    # Each deep pass carries tokens that exited early.
    assert len(calls) == len(range(offset, deep, every))
    assert all(0 <= agreed <= compared and compared > 0 for agreed, compared in calls)


def test_the_monitor_counts_the_early_tokens_that_full_depth_would_choose(model):
    exits = itertools.cycle([True, True, False])
    calls: list[tuple[int, int]] = []
    policy = CallablePolicy(lambda *_: next(exits))
    policy = MonitoredPolicy(policy, lambda *counts: calls.append(counts), every=1)
    loop = decode(model, exit_policy=policy, max_pending=30)
    ids = random_ids(5)[0].tolist() + loop.trace.tokens
    best = model.base(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    early = [i for i, one in enumerate(loop.trace.records) if one.exit_layer < 4]
    pending = loop.cache.length(0) - loop.cache.length(3)
    early = [i for i in early if i < len(ids) - 5 - pending]
    agreed = sum(best[5 + i - 1] == ids[5 + i] for i in early)
    assert sum(a for a, _ in calls) == agreed
    assert sum(c for _, c in calls) == len(early)


def test_a_finished_loop_and_its_cache_are_freed_without_the_cycle_collector(model):
    gc.collect()
    gc.disable()
    try:
        loop = decode(model, fidelity=Fidelity.EXACT)
        gone = weakref.ref(loop), weakref.ref(loop.cache)
        del loop
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_a_cache_is_made_once(model, monkeypatch):
    made = []
    new_cache = model.backbone.new_cache
    monkeypatch.setattr(
        model.backbone, "new_cache", lambda *args: made.append(args) or new_cache(*args)
    )
    decode(model)
    assert made == [(5 + 30, 1)]
