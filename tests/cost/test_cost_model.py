"""The cost model: fits recover what made the times, predictions add up, exits must pay."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latency_plant import EXITS, MAX_PENDING, Plant, plant_cost
from tiny_calibration import tiny_cost
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.break_even import break_even_rate, drop_unprofitable
from deliberate.cost import measure as cost_measure
from deliberate.cost import probe
from deliberate.cost.cache import fingerprint, keep, recall
from deliberate.cost.fit import TimedPart, best_fit
from deliberate.cost.measure import Grid, cached_cost, measure
from deliberate.cost.meter import Work, WorkMeter, predict_seconds
from deliberate.cost.model import CostModel, duration
from deliberate.cost.parts import PassCost, SegmentCost, Staleness, WarmCost
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.utils.errors import DeliberateError
from deliberate.utils.folders import cache_folder

SMALL = Grid(tokens=(1, 3), contexts=(8, 16), batches=(1, 2), prompts=(4, 8), steps=12, rounds=2)


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])


def parts_of(model: AdaptiveModel):
    return model.backbone, model.reader(), model.exit_config


def layer_cost(
    *, layers: int = 24, exits=(2, 12), head: float = 0.0, score: float = 0.0, gate=None
) -> CostModel:
    """Costs in units of one layer, deferred tokens free, as in the published break-even rules."""
    edges = [0, *exits, layers]
    segments = []
    for low, high in itertools.pairwise(edges):
        cost = PassCost(float(high - low))
        segments.append(SegmentCost(WarmCost(cost), WarmCost(cost), cost))
    read = WarmCost(PassCost(head + score if gate is None else gate + score))
    return CostModel(
        tuple(exits),
        layers,
        tuple(segments),
        (read,) * len(exits),
        PassCost(head),
        gated=gate is not None,
    )


# -- break-even ------------------------------------------------------------------------------------


@given(
    head=st.floats(0.01, 30),
    score=st.floats(0, 2),
    exit_layer=st.integers(1, 23),
)
def test_with_the_full_head_an_exit_pays_from_the_published_rate_on(head, score, exit_layer):
    cost = layer_cost(exits=(exit_layer,), head=head, score=score)
    published = (head + score) / (24 - exit_layer + head)
    rate = break_even_rate(cost, 0)
    assert rate == pytest.approx(published) if published <= 1 else math.isinf(rate)


@given(gate=st.floats(0.001, 1), score=st.floats(0, 1), exit_layer=st.integers(1, 23))
def test_behind_a_gate_an_exit_pays_from_the_published_rate_on(gate, score, exit_layer):
    cost = layer_cost(exits=(exit_layer,), head=9.0, score=score, gate=gate)
    published = (gate + score) / (24 - exit_layer)
    rate = break_even_rate(cost, 0)
    assert rate == pytest.approx(published) if published <= 1 else math.isinf(rate)


def test_at_the_break_even_rate_asking_and_not_asking_cost_the_same():
    cost = plant_cost()
    rate = break_even_rate(cost, 0, beyond=1)
    above = cost.passed_on_seconds(1) + cost.read_seconds(1)
    requested = cost.read_seconds(0) + (1 - rate) * above
    assert requested == pytest.approx(above)


def test_an_exit_below_its_break_even_rate_is_dropped_with_the_reason_in_words():
    cost = layer_cost(exits=(2, 12), head=4.0, score=0.0)
    kept, reasons = drop_unprofitable(cost, [0.03, 0.6], deferred=False)
    assert kept == (12,)
    needed = break_even_rate(cost, 0, beyond=1, deferred=False)
    assert reasons == [
        f"exit after layer 2: 3 % of tokens exit; at 4 s per read it pays from "
        f"{100 * needed:.0f} % on: dropped"
    ]


def test_tokens_of_a_dropped_exit_count_at_the_next_one():
    cost = layer_cost(exits=(11, 12), head=6.0)
    # Alone the later exit would fall short; with the tokens of the earlier one it pays.
    share = 0.2
    assert share < break_even_rate(cost, 1) < 1 - (1 - share) * (1 - 0.5)
    kept, reasons = drop_unprofitable(cost, [0.5, share], deferred=False)
    assert kept == (12,) and len(reasons) == 1 and "layer 11" in reasons[0]


def test_an_exit_that_pays_at_no_rate_says_so():
    kept, reasons = drop_unprofitable(layer_cost(exits=(23,), head=1.0, score=5.0), [1.0])
    assert kept == () and "pays at no rate" in reasons[0]


@given(rates=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_every_exit_is_either_kept_or_explained(rates):
    kept, reasons = drop_unprofitable(plant_cost(), rates)
    assert len(kept) + len(reasons) == 3 and set(kept) <= set(EXITS)


@pytest.mark.parametrize("rates", [[0.5], [0.1, 0.2, 1.5], [0.1, 0.2, math.nan]])
def test_rates_that_do_not_fit_are_one_line(rates):
    with pytest.raises(DeliberateError) as error:
        drop_unprofitable(plant_cost(), rates)
    assert "\n" not in str(error.value) and "rate" in str(error.value)


# -- prediction ------------------------------------------------------------------------------------


def test_a_generation_is_predicted_as_the_sum_of_what_it_ran():
    cost = plant_cost()
    passes = [(0, 1, 1, 41), (0, 1, 1, 42), (1, 1, 2, 42), (2, 1, 2, 42), (3, 1, 2, 42)]
    expected = cost.prompt_seconds(40) + 2 * cost.step
    expected += 2 * cost.segment_seconds(0, context=40) + 2 * cost.read_seconds(0)
    expected += sum(cost.segment_seconds(k, tokens=2, context=40) for k in (1, 2, 3))
    expected += cost.read_seconds(1) + cost.read_seconds(2) + cost.head_seconds
    assert predict_seconds(cost, Work(EXITS, passes, prompts=(1, 40))) == pytest.approx(expected)


def test_counted_reads_replace_assumed_ones():
    cost = plant_cost()
    passes = [(0, 1, 1, 41), (1, 1, 1, 41)]
    silent = predict_seconds(cost, Work(EXITS, passes, reads=[]))
    assert predict_seconds(cost, Work(EXITS, passes, reads=[(0, 1)])) == pytest.approx(
        silent + cost.read_seconds(0)
    )
    assert predict_seconds(cost, Work(EXITS, passes)) == pytest.approx(
        silent + cost.read_seconds(0) + cost.read_seconds(1)
    )


def test_a_counted_read_is_as_warm_as_the_pass_before_it():
    cost = warm_cost_model(0.0)
    passes = [(0, 1, 1, 41), (0, 1, 1, 42), (0, 1, 1, 43)]
    counted = Work(EXITS, passes, reads=[(0, 1)] * 3)
    assert predict_seconds(cost, counted) == pytest.approx(
        predict_seconds(cost, Work(EXITS, passes))
    )


def test_a_meter_adds_up_to_the_prediction_however_it_is_read():
    cost = dataclasses.replace(plant_cost(), memory=0.5)
    generator = random.Random(3)
    passes: list[tuple[int, int, int, int]] = []
    work = Work(EXITS, passes, prompts=(1, 7))
    meter = WorkMeter(cost, work)
    seen = meter.seconds()
    for step in range(60):
        for segment in range(generator.randint(1, 4)):
            passes.append((segment, 1, 1 + segment, 8 + step + segment))
        if step % 3 == 0:
            assert meter.seconds() > seen
            seen = meter.seconds()
    assert meter.seconds() == pytest.approx(predict_seconds(cost, work))


def test_dense_work_is_priced_with_all_segments_merged():
    cost = plant_cost()
    work = Work((), [(0, 1, 1, 41)] * 10, prompts=(1, 40))
    assert predict_seconds(cost, work) == pytest.approx(
        cost.prompt_seconds(40) + 10 * cost.dense_seconds_per_token(40)
    )


def test_the_fastest_policy_is_never_slower_than_dense_and_dropping_exits_never_changes_dense():
    cost = plant_cost()
    assert cost.least_seconds_per_token(MAX_PENDING) < 0.5 * cost.dense_seconds_per_token()
    slow_reads = dataclasses.replace(cost, reads=(WarmCost(PassCost(1.0)),) * 3)
    assert slow_reads.least_seconds_per_token(4) == slow_reads.dense_seconds_per_token()
    for layers in ((), (4,), (2, 6)):
        fewer = cost.restricted(layers)
        assert fewer.dense_seconds_per_token() == pytest.approx(cost.dense_seconds_per_token())
    with pytest.raises(DeliberateError, match="layer 3 is not an exit"):
        cost.restricted((3,))


def test_going_on_to_the_top_from_the_first_exit_costs_dense_with_reads():
    """The costs of going on, with what riders pay anyway, add up to a token through all layers."""
    cost = plant_cost()
    warm = tuple(
        SegmentCost(dataclasses.replace(s.single, saved=1e-4), s.several, s.prompt)
        for s in cost.segments
    )
    cost = dataclasses.replace(cost, segments=warm)
    whole = cost.first_seconds() + sum(cost.continuation_seconds()) + cost.all_deferred_seconds()
    reads = sum(cost.read_seconds(k) for k in range(3))
    assert whole == pytest.approx(cost.dense_seconds_per_token() + reads)


def test_the_seconds_of_a_policy_agree_with_a_machine_that_runs_it():
    """Within 10 %, with thresholds at which tokens leave at every exit."""
    cost, row = plant_cost(), (0.45, 0.5, 0.4)
    plant = Plant(cost, seed=4)
    plant.respond(FixedPolicy(row), 3000)
    taken = sum(plant.step_seconds[1:]) / 2999
    steps = (cost.first_seconds(), *cost.continuation_seconds())
    decided = [sum(steps[: k + 1]) for k in plant.exits]
    (expected,) = cost.policy_seconds([sum(decided) / len(decided)], MAX_PENDING)
    assert expected == pytest.approx(taken, rel=0.1)
    assert len(set(plant.exits)) == 4


# -- the processor's cache -------------------------------------------------------------------------


def test_staleness_is_the_share_of_other_layers_run_since():
    stale = Staleness((2, 4, 6, 8), memory=0.0)
    assert stale.run(0) == 1.0  # after the prompt's pass
    assert stale.run(0) == 0.0
    stale.run(1)
    assert stale.run(0) == pytest.approx(2 / 6)
    assert [stale.run(k) for k in (1, 2, 3)][2] == 1.0
    assert stale.run(0) == 1.0


def test_with_memory_a_segment_warms_up_over_several_passes():
    stale = Staleness((2, 4, 6, 8), memory=0.5)
    assert [stale.run(0) for _ in range(3)] == [1.0, 0.5, 0.25]
    for k in (1, 2, 3):
        stale.run(k)
    assert stale.run(0) == pytest.approx(0.125 + 0.5)


def test_without_exits_the_only_segment_is_always_cold():
    stale = Staleness((8,), memory=0.5)
    assert [stale.run(0) for _ in range(3)] == [1.0, 1.0, 1.0]


@given(st.lists(st.integers(0, 3), max_size=40), st.floats(0, 0.95))
def test_staleness_stays_within_its_bounds(segments, memory):
    stale = Staleness((1, 2, 5, 9), memory)
    assert all(0.0 <= stale.run(segment) <= 1.0 for segment in segments)


# -- fitting ---------------------------------------------------------------------------------------


def made_up_times(cost: CostModel, noise: float = 0.0) -> list[TimedPart]:
    """Times of random steps exactly as a cost model has them, or with noise."""
    generator = random.Random(5)
    stale = Staleness(cost.boundaries, cost.memory)
    timed: list[TimedPart] = []

    def add(part: str, index: int, batch: int, tokens: int, context: int, seconds: float) -> None:
        samples = [seconds * math.exp(generator.gauss(0, noise)) for _ in range(9)]
        timed.append(TimedPart(part, index, batch, tokens, context, samples))

    for length in (8, 32, 128):
        for k, segment in enumerate(cost.segments):
            stale.run(k)
            add("prompt", k, 1, length, length, segment.prompt.seconds(1, length, length))
    for number in range(400):
        batch = generator.choice((1, 1, 2, 4, 8))
        context = generator.choice((32, 64, 256))
        add("step", 0, batch, 1, 0, cost.step)
        for k in range(1 if number % 2 else generator.randint(1, 4)):
            tokens = generator.choice((1, 2, 8)) if k else 1
            now = stale.run(k)
            seconds = cost.segments[k].seconds(batch, tokens, context, now)
            add("segment", k, batch, tokens, context, seconds)
            if k < 3:
                add("read", k, batch, 1, 0, cost.reads[k].seconds(batch, 1, 0, now))
            else:
                rows = batch * generator.choice((1, tokens))
                add("head", 0, rows, 1, 0, cost.head.seconds(rows, 1, 0))
    return timed


def warm_cost_model(memory: float) -> CostModel:
    segment = SegmentCost(
        single=WarmCost(PassCost(6e-4, per_key=2e-7), saved=3e-4),
        several=WarmCost(PassCost(7e-4, 3e-5, 4e-7, 2e-8), saved=2e-4),
        prompt=PassCost(7e-4, 2e-5, 0.0, 2e-8),
    )
    read = WarmCost(PassCost(1e-4, 1e-5), saved=4e-5)
    head = PassCost(1e-4, 5e-6)
    return CostModel((2, 4, 6), 8, (segment,) * 4, (read,) * 3, head, 2e-5, memory)


@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_the_fit_recovers_the_model_that_made_the_times(memory):
    truth = warm_cost_model(memory)
    fit = best_fit(made_up_times(truth), truth.boundaries)
    assert fit.memory == memory
    assert max(fit.errors) < 1e-3
    for tokens, context, staleness in ((1, 100, 0.4), (1, 300, 1.0), (6, 200, 0.7)):
        for found, true in zip(fit.segments[:2], truth.segments[:2], strict=True):
            # The first segment only ever sees one token of each sequence.
            batch = 1 if tokens == 1 else 3
            each = 1 if found is fit.segments[0] else tokens
            assert found.seconds(batch, each, context, staleness) == pytest.approx(
                true.seconds(batch, each, context, staleness), rel=0.02
            )


def test_noise_is_reported_as_the_fits_own_error():
    truth = warm_cost_model(0.0)
    fit = best_fit(made_up_times(truth, noise=0.3), truth.boundaries)
    errors = sorted(fit.errors)
    assert 0.02 < errors[len(errors) // 2] < 0.3


# -- measuring and keeping -------------------------------------------------------------------------


def test_a_measurement_prices_every_part_and_only_reads_the_model(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    rounds = []
    cost = measure(*parts_of(model), grid=SMALL, between=rounds.append)
    assert cost.layers == (1, 2) and cost.num_layers == 4
    assert cost.dense_seconds_per_token(8) > cost.segment_seconds(0, context=8) > 0
    assert cost.head_seconds > 0 and cost.read_seconds(0) > 0 and cost.step > 0
    assert rounds == [0, 1] and cost.facts["rounds"] == 2
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_measured_seconds_are_those_of_the_clock_given(model):
    """A clock that ticks once per reading gives every part the same time."""
    ticks = iter(range(10**9))
    cost = measure(*parts_of(model), grid=SMALL, clock=lambda: float(next(ticks)))
    assert cost.fit_error < 1e-6
    assert cost.segment_seconds(1, tokens=3, context=12) == pytest.approx(1.0)
    assert cost.read_seconds(1) == pytest.approx(1.0) and cost.step == 1.0


def test_a_grid_is_cut_to_the_models_context(model):
    grid = Grid().within(64)
    assert max(grid.contexts) + max(grid.tokens) <= 64 and max(grid.prompts) < 64
    assert Grid().within(None) == Grid()
    with pytest.raises(DeliberateError, match="too short"):
        Grid().within(12)


@pytest.mark.parametrize(
    "settings",
    [{"tokens": (2, 4)}, {"batches": ()}, {"contexts": (0,)}, {"rounds": 0}, {"batches": (2,)}],
)
def test_a_grid_that_cannot_be_measured_is_one_line(settings):
    with pytest.raises(DeliberateError) as error:
        Grid(**settings)
    assert "\n" not in str(error.value)


def quiet(monkeypatch, ratio: float = 1.0, noise: float = 0.0) -> list[int]:
    """A machine as it was measured: no load, and a probe of this ratio. Returns measurements."""
    made: list[int] = []
    own = cost_measure.measure

    def measure(*args, **kwargs):
        made.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(cost_measure, "measure", measure)
    monkeypatch.setattr(probe, "probe", lambda *_args: ratio)
    monkeypatch.setattr(probe, "noise_of", lambda _parts: noise)
    monkeypatch.setattr(probe, "conditions_now", lambda _device: {"load": 1.0, "cores": 4})
    return made


def test_a_kept_model_is_found_again_by_its_fingerprint_only(model, tmp_path, monkeypatch):
    quiet(monkeypatch)
    parts = parts_of(model)
    cost = cached_cost(*parts, folder=tmp_path, grid=SMALL)
    assert cached_cost(*parts, folder=tmp_path) == cost  # not measured again
    other = model.exit_config.with_thresholds(0.3)
    assert fingerprint(model.backbone, other) == cost.fingerprint
    # A file that another fingerprint's name led to is not believed.
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace(cost.fingerprint, cost.fingerprint[:16] + "0" * 48))
    assert recall(cost.fingerprint, tmp_path) is None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert fingerprint(*parts[::2]) != cost.fingerprint
    finally:
        torch.set_num_threads(threads)


def test_times_of_a_busy_moment_are_corrected_by_a_probe(model, tmp_path, monkeypatch):
    made = quiet(monkeypatch)
    cost = cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL)
    quiet(monkeypatch, ratio=0.3)
    found = cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL)
    assert found.dense_seconds_per_token() == pytest.approx(0.3 * cost.dense_seconds_per_token())
    assert found.facts["corrected"] == 0.3 and len(made) == 1
    assert found.prompt_seconds(9, 2) == pytest.approx(0.3 * cost.prompt_seconds(9, 2))
    for ratio in (0.8, 1.2, 5.0):  # about right, or busy now: what was measured counts
        quiet(monkeypatch, ratio=ratio)
        assert cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL) == cost


def test_a_noisy_measurement_is_stored_as_such_and_made_again_a_few_times(
    model, tmp_path, monkeypatch
):
    made = quiet(monkeypatch, noise=0.8)
    parts = parts_of(model)
    cost = cached_cost(*parts, folder=tmp_path, grid=SMALL)
    assert probe.is_noisy(cost.facts) and recall(cost.fingerprint, tmp_path) == cost
    monkeypatch.setattr(probe, "probe", lambda *_args: 4.0)
    assert cached_cost(*parts, folder=tmp_path, grid=SMALL) == cost and len(made) == 1
    monkeypatch.setattr(probe, "probe", lambda *_args: 0.4)
    for count in (2, 3, 3):
        again = cached_cost(*parts, folder=tmp_path, grid=SMALL)
        assert len(made) == count and recall(cost.fingerprint, tmp_path).facts["attempts"] == count
    assert again.facts["corrected"] == 0.4


def test_a_quiet_measurement_replaces_a_noisy_one(model, tmp_path, monkeypatch):
    quiet(monkeypatch, noise=0.8)
    cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL)
    made = quiet(monkeypatch)
    for _ in range(3):
        assert not probe.is_noisy(cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL).facts)
    assert len(made) == 1


def test_noise_is_the_spread_of_a_parts_times():
    steady = TimedPart("segment", 0, 1, 1, 8, [1.0, 1.02, 1.01, 1.03, 1.02])
    busy = TimedPart("segment", 0, 1, 1, 8, [1.0, 1.9, 1.1, 2.5, 1.8])
    assert probe.noise_of([steady] * 3) == pytest.approx(0.02)
    assert probe.noise_of([busy] * 3 + [steady] * 2) == pytest.approx(0.9)
    assert probe.noise_of([TimedPart("step", 0, 1, 1, 0, [1.0])]) == 0.0
    assert probe.is_noisy({"load": 6.0, "cores": 2}) and not probe.is_noisy({})


def test_a_probe_times_full_depth_steps_on_the_clock_given(model):
    ticks = iter(range(1000))
    cost = tiny_cost(model, 0.5)
    ratio = probe.probe(cost, model.backbone, clock=lambda: float(next(ticks)))
    assert ratio == pytest.approx(1.0 / cost.dense_seconds_per_token(64))


def test_a_damaged_cache_entry_is_measured_anew(model, tmp_path):
    cost = cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "{}", whole.replace('"step"', '"stop"')):
        path.write_text(text)
        assert recall(cost.fingerprint, tmp_path) is None
    assert cached_cost(*parts_of(model), folder=tmp_path, grid=SMALL) == recall(
        cost.fingerprint, tmp_path
    )


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert keep(plant_cost()).parent == tmp_path / "here"
    monkeypatch.delenv("DELIBERATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deliberate"


def test_a_cost_model_survives_json():
    cost = dataclasses.replace(warm_cost_model(0.6), facts={"device": "x"}, fingerprint="f")
    assert CostModel.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


@pytest.mark.parametrize(
    "change",
    [{"format_version": 0}, {"head": None}, {"layers": [2, 4]}, {"step": -1.0}, {"memory": 1.0}],
)
def test_a_foreign_cost_model_is_one_line(change):
    with pytest.raises(DeliberateError) as error:
        CostModel.from_dict(plant_cost().to_dict() | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_costs_are_finite_and_not_negative(value):
    with pytest.raises(DeliberateError):
        PassCost(value)
    with pytest.raises(DeliberateError):
        WarmCost(PassCost(1.0), saved=value)


def test_durations_take_the_unit_that_suits_them():
    assert [duration(s) for s in (0.0019, 42e-6, 3.1, 0.0)] == ["1.9 ms", "42 us", "3.1 s", "0 us"]


def test_counts_of_a_real_generation_can_be_priced(model):
    from deliberate.api.generation import AdaptiveDecoding

    cost = measure(*parts_of(model), grid=SMALL)
    for fidelity in ("dense", "exact", "threshold"):
        loop = AdaptiveDecoding(model, fidelity, 0.02).loop(max_new_tokens=12, end_tokens=())
        for _ in loop.run(random_ids(6)):
            pass
        work = Work(loop.boundaries[:-1], loop.batch.passes, (1, 6), fidelity == "exact")
        assert predict_seconds(cost, work) > cost.prompt_seconds(6)
