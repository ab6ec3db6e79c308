"""Measuring costs: fits recover what made the times, kept models are found again."""

from __future__ import annotations

import math
import random

import pytest
import torch
from latency_plant import plant_cost
from tiny_calibration import tiny_cost
from tiny_models import random_ids, tiny_model
from warm_costs import warm_cost_model

from deliberate.api.model import AdaptiveModel
from deliberate.cost import measure as cost_measure
from deliberate.cost import probe
from deliberate.cost.cache import fingerprint, keep, recall
from deliberate.cost.fit import TimedPart, best_fit
from deliberate.cost.grid import Grid
from deliberate.cost.measure import cached_cost, measure
from deliberate.cost.meter import Work, predict_seconds
from deliberate.cost.model import CostModel
from deliberate.cost.parts import Staleness
from deliberate.utils.errors import DeliberateError
from deliberate.utils.folders import cache_folder

SMALL = Grid(tokens=(1, 3), contexts=(8, 16), batches=(1, 2), prompts=(4, 8), steps=12, rounds=2)


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])


def parts_of(model: AdaptiveModel):
    return model.backbone, model.reader(), model.exit_config


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


def test_counts_of_a_real_generation_can_be_priced(model):
    from deliberate.api.generation import AdaptiveDecoding

    cost = measure(*parts_of(model), grid=SMALL)
    for fidelity in ("dense", "exact", "threshold"):
        loop = AdaptiveDecoding(model, fidelity, 0.02).loop(max_new_tokens=12, end_tokens=())
        for _ in loop.run(random_ids(6)):
            pass
        work = Work(loop.boundaries[:-1], loop.batch.passes, (1, 6), fidelity == "exact")
        assert predict_seconds(cost, work) > cost.prompt_seconds(6)
