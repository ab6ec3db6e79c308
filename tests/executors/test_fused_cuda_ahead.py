"""The CUDA executor runs segments and steps ahead of an exit's answer."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_cases import Recorder, adaptive, cpu_only
from fused_cases import close, family
from tiny_models import random_ids
from torch import Tensor

from deliberate.executors.fused.cuda.graphs import HostDevice
from deliberate.executors.fused.cuda.prefetch import InFlight, Launch, Prefetcher
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

# -- running ahead ---------------------------------------------------------------------------------


@torch.inference_mode()
def ask(backbone, reader, ids: Tensor, position: int, cache, threshold: float):
    """One token through the first segment, and the question there; what is to go on."""
    ctx = backbone.context(position, 1, device="cpu")
    hidden = backbone.embed(ids[:, position : position + 1], ctx)
    hidden = backbone.run_layers(hidden, 0, 2, ctx, cache)
    return hidden, ctx, reader.evaluate(0, hidden[:, -1], threshold, cache=cache)


@cpu_only
def test_the_next_segment_is_launched_behind_the_flag_and_taken_when_wanted():
    device = Recorder()
    model = adaptive(family("llama"), [2], prefetch=True, device=device)
    backbone, reader, ids = model.backbone, model.reader(), random_ids(9)
    plain = Backbone(model.base)
    caches = [plain.new_cache(), backbone.new_cache()]
    for position in range(4):
        begun = len(device.log)
        hidden, ctx, reading = ask(backbone, reader, ids, position, caches[1], 2.0)
        assert reading.confidences[0] < 2.0
        order = device.log[begun:]
        assert order[-3:] == ["post", order[-2], "wait"] and order[-2].startswith("replay")
        replays = len(device.log)
        made = backbone.run_layers(hidden, 2, 4, ctx, caches[1])
        assert len(device.log) == replays  # taken: nothing is run again
        ctx = plain.context(position, 1, device="cpu")
        x = plain.embed(ids[:, position : position + 1], ctx)
        assert close(made, plain.run_layers(x, 0, 4, ctx, caches[0]))
    assert backbone.launches.taken == 4 and backbone.take_discarded(caches[1]) == []
    assert caches[1].lengths == [4] * 4


@cpu_only
def test_a_segment_launched_in_vain_changes_nothing_and_is_counted():
    model = adaptive(family("llama"), [2], prefetch=True)
    backbone, reader, ids = model.backbone, model.reader(), random_ids(9)
    plain = Backbone(model.base)
    cache, other = backbone.new_cache(), plain.new_cache()
    states = []
    for position in range(3):
        # Launched for a token that the device lets go on; the host decides otherwise.
        hidden, _, _ = ask(backbone, reader, ids, position, cache, 2.0)
        states.append(hidden)
        assert cache.lengths == [position + 1] * 2 + [0] * 2
    ctx = backbone.context(0, 3, device="cpu")
    made = backbone.run_layers(torch.cat(states, dim=1), 2, 4, ctx, cache)
    ctx = plain.context(0, 3, device="cpu")
    assert close(made, plain.run_layers(plain.embed(ids[:, :3], ctx), 0, 4, ctx, other))
    discarded = backbone.take_discarded(cache)
    assert [(one.first, one.last, one.rows, one.starts) for one in discarded] == [
        (2, 4, (0,), (0,)),
        (2, 4, (0,), (1,)),
        (2, 4, (0,), (2,)),
    ]
    assert backbone.take_discarded(cache) == []


@cpu_only
def test_a_token_that_the_device_lets_leave_is_not_run_and_may_still_go_on():
    model = adaptive(family("llama"), [2], prefetch=True)
    backbone, reader, ids = model.backbone, model.reader(), random_ids(9)
    cache, plain = backbone.new_cache(), Backbone(model.base)
    hidden, ctx, _ = ask(backbone, reader, ids, 0, cache, 0.0)
    step = cache.workspace.step(1)
    assert int(step.listed.count) == 0 and bool((cache.workspace.keys[2:] == 0).all())
    made = backbone.run_layers(hidden, 2, 4, ctx, cache)  # the host's word counts
    ctx = plain.context(0, 1, device="cpu")
    x = plain.embed(ids[:, :1], ctx)
    assert close(made, plain.run_layers(x, 0, 4, ctx, plain.new_cache()))
    assert len(backbone.take_discarded(cache)) == 1


@cpu_only
def test_two_caches_of_a_model_do_not_see_what_the_other_has_in_flight():
    model = adaptive(family("llama"), [2], prefetch=True)
    backbone, reader = model.backbone, model.reader()
    prompts = random_ids(9, seed=1), random_ids(9, seed=2)
    plain = Backbone(model.base)
    caches, wanted = [backbone.new_cache() for _ in prompts], [plain.new_cache() for _ in prompts]
    for position in range(3):
        # Both ask before either goes on: the same rows, at the same positions.
        asked = [
            ask(backbone, reader, ids, position, cache, 2.0)
            for ids, cache in zip(prompts, caches, strict=True)
        ]
        for place in (1, 0):
            hidden, ctx, _ = asked[place]
            made = backbone.run_layers(hidden, 2, 4, ctx, caches[place])
            ctx = plain.context(position, 1, device="cpu")
            x = plain.embed(prompts[place][:, position : position + 1], ctx)
            assert close(made, plain.run_layers(x, 0, 4, ctx, wanted[place]))
    assert backbone.launches.taken == 6
    # What one gives up, the other does not count.
    ask(backbone, reader, prompts[0], 3, caches[0], 2.0)
    assert backbone.take_discarded(caches[1], final=True) == []
    assert len(backbone.take_discarded(caches[0], final=True)) == 1


@cpu_only
def test_a_copy_of_a_model_launches_early_as_the_model_does():
    model = adaptive(family("llama"), [2], prefetch=True)
    again = copy.deepcopy(model.backbone)
    assert again.launches.enabled and again.launches is not model.backbone.launches


def launch(rows=(0, 1), starts=(7, 9), version=3) -> Launch:
    return Launch(0, 2, 4, rows, starts, version)


@cpu_only
@pytest.mark.parametrize(
    ("change", "layer"),
    [
        ({}, 4),
        ({"rows": (1,), "starts": (9,), "counts": (1,)}, 4),  # some of the rows
        ({"last": 6}, 4),  # on to a deeper stop
        ({"last": 3}, None),
        ({"first": 0}, None),
        ({"starts": (7, 10)}, None),
        ({"counts": (1, 2)}, None),  # tokens that waited ride along
        ({"version": 4}, None),  # rows were renumbered
        ({"rows": (0, 2), "starts": (7, 9)}, None),
    ],
)
def test_only_the_pass_that_was_guessed_is_taken(change, layer):
    multi_step = InFlight(Prefetcher(True))
    multi_step.begin(launch())
    multi_step.answered((0, 1))
    requested = {"rows": (0, 1), "starts": (7, 9), "counts": (1, 1), "first": 2, "last": 4}
    assert multi_step.take(**(requested | {"version": 3} | change)) == layer
    assert len(multi_step.take_discarded()) == (layer is None)
    assert multi_step.open is None and multi_step.take(**requested, version=3) is None  # once


@cpu_only
def test_a_row_that_was_not_run_is_not_taken():
    multi_step = InFlight(Prefetcher(True))
    multi_step.begin(launch())
    multi_step.answered((1,))
    assert multi_step.take((0,), (7,), (1,), 2, 4, 3) is None


@cpu_only
def test_an_exit_where_most_tokens_leave_is_seldom_guessed_at():
    multi_step = InFlight(Prefetcher(True, least_taken=0.5))
    tries = 0
    for _ in range(400):
        if multi_step.worth(0):
            tries += 1
            multi_step.begin(launch())
            multi_step.give_up()
    assert 5 < tries < 30
    assert multi_step.worth(1)  # each exit has its own share
    for _ in range(300):  # and it recovers
        if multi_step.worth(0):
            multi_step.begin(launch())
            multi_step.answered((0, 1))
            assert multi_step.take((0, 1), (7, 9), (1, 1), 2, 4, 3) == 4
    assert multi_step.worth(0)


@cpu_only
def test_a_share_outside_its_range_is_a_one_line_error():
    with pytest.raises(DeliberateError, match=r"least_taken 1.5 is outside \[0, 1\]"):
        Prefetcher(True, least_taken=1.5)


# -- several steps on the device -------------------------------------------------------------------


def decode(backbone, reader, cache, exit_index, last, **how):
    given = {"steps": 6, "requested": 6, "threshold": -1.0, "stops": (), "accept_stops": True}
    multi_step = backbone.multi_step(reader)
    return multi_step.decode(exit_index, last, 3, 0, cache, **(given | how))


@torch.inference_mode()
def by_hand(model, steps: int, last: int) -> tuple[list[int], list[float], Tensor]:
    """Tokens, probabilities and states of greedy steps through the layers below `last`."""
    plain = Backbone(model)
    cache, token = plain.new_cache(), 3
    tokens, scores, states = [], [], []
    for position in range(steps):
        ctx = plain.context(position, 1, device="cpu")
        hidden = plain.embed(torch.tensor([[token]]), ctx)
        hidden = plain.run_layers(hidden, 0, last, ctx, cache)
        share = plain.logits(hidden)[0, 0].softmax(dim=-1)
        token = int(share.argmax())
        tokens.append(token)
        scores.append(float(share.max()))
        states.append(hidden[0, 0])
    return tokens, scores, torch.stack(states)


@cpu_only
@pytest.mark.parametrize("device", [HostDevice, Recorder])
def test_steps_feed_their_own_tokens(device):
    model = adaptive(family("qwen3"), [2], device=device())
    backbone, reader = model.backbone, model.reader()
    for exit_index, last in ((None, 4), (0, 2)):
        tokens, scores, states = by_hand(model.base, 7, last)
        cache = backbone.new_cache()
        made = decode(backbone, reader, cache, exit_index, last, steps=7, requested=6)
        assert made.tokens == tokens[:6] and made.accepted == 6
        assert made.scores == pytest.approx(scores[:6], rel=1e-5)
        assert close(made.states, states)  # the seventh was fed and not asked
        assert cache.lengths == [7] * last + [0] * (4 - last)
        assert backbone.take_discarded(cache) == []


@cpu_only
@pytest.mark.parametrize("accept_stops", [True, False])
def test_steps_end_at_a_stop_and_count_what_was_launched_behind_it(accept_stops):
    model = adaptive(family("qwen3"), [2])
    backbone = model.backbone
    tokens, _, _ = by_hand(model.base, 6, 4)
    at = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    cache = backbone.new_cache()
    how = {"threshold": -float("inf"), "stops": (tokens[at],), "accept_stops": accept_stops}
    made = decode(backbone, None, cache, None, 4, **how)
    assert made.tokens == tokens[: at + 1] and made.accepted == at + accept_stops
    assert cache.lengths == [at + 1] * 4
    discarded = backbone.take_discarded(cache)
    assert [(one.first, one.last, one.starts) for one in discarded] == [(0, 4, (at + 1,))]


@cpu_only
def test_steps_end_at_the_first_token_below_the_threshold():
    model = adaptive(family("qwen3"), [2])
    backbone, reader = model.backbone, model.reader()
    _, scores, _ = by_hand(model.base, 6, 2)
    worst = min(range(6), key=scores.__getitem__)
    cache = backbone.new_cache()
    made = decode(backbone, reader, cache, 0, 2, threshold=scores[worst] + 1e-6)
    ends = next(i for i in range(6) if scores[i] < scores[worst] + 1e-6)
    assert (len(made.tokens), made.accepted, len(made.states)) == (ends + 1, ends, ends + 1)
    assert cache.lengths == [ends + 1] * 2 + [0] * 2


@cpu_only
def test_a_step_is_launched_while_the_answer_of_the_one_before_travels():
    device = Recorder()
    model = adaptive(family("qwen3"), [2], device=device, prefetch=True)
    backbone, reader = model.backbone, model.reader()

    def log(exit_index: int | None, **how) -> list[str]:
        begun = len(device.log)
        decode(backbone, reader, backbone.new_cache(), exit_index, 4, **how)
        return [entry.split()[0] for entry in device.log[begun:]]

    one = ["replay", "post"]
    behind = [*one, *one, "wait", *one, "wait", "wait"]
    assert log(None, steps=3, requested=3, threshold=-float("inf")) == behind
    # Drafts wait for each other's answers until most of them stand.
    assert log(0, steps=3, requested=3) == [*one, "wait"] * 3
    for _ in range(8):
        log(0)
    assert log(0, steps=3, requested=3) == behind
    log(0, threshold=2.0)
    log(0, threshold=2.0)
    assert log(0, steps=3, requested=3) == [*one, "wait"] * 3


@cpu_only
def test_layers_run_in_vain_are_in_the_trace():
    """The same tokens; what the executor ran for nothing is counted beside what it needed."""
    base, ids = family("llama"), random_ids(9)
    settings = {
        "max_new_tokens": 14,
        "fidelity": "threshold",
        "thresholds": 0.3,
        "kv_mode": "propagate",
        "return_dict_in_generate": True,
    }
    traces, discarded = [], []
    for multi_step in (False, True):
        model = adaptive(base, [2], prefetch=multi_step)
        model.backbone.launches._least_taken = 0.0
        kept = model.backbone.take_discarded
        model.backbone.take_discarded = lambda cache, kept=kept, **how: (
            discarded.extend(found := kept(cache, **how)) or found
        )
        traces.append(model.generate(ids, **settings).trace)
    assert traces[0].tokens == traces[1].tokens
    more = [b - a for a, b in zip(traces[0].layer_calls, traces[1].layer_calls, strict=True)]
    assert discarded and more == [0, 0, len(discarded), len(discarded)]
