"""`deliberate bench throughput`: loads, arrivals, servers, figures, and a failing rival's name."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks import throughput
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.eval.benchmarks.throughput_engine import EngineServer
from deliberate.eval.benchmarks.throughput_figures import Rounds, report
from deliberate.eval.benchmarks.throughput_load import Call, Load, arriving, loads_of
from deliberate.eval.benchmarks.throughput_servers import (
    Arrivals,
    Served,
    StaticServer,
    TransformersContinuous,
    bytes_per_token,
    static_dense,
)
from deliberate.utils.errors import DeliberateError

SMALL = (
    *("requests=5", "rounds=1", "warmup=1", "batch_size=2", "few=2", "executor=generic"),
    *("prompt_tokens=[5,20]", "answer_tokens=[2,6]", "prefix_tokens=24", "own_tokens=[3,6]"),
    "prefix_answer_tokens=[2,4]",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(*more):
    return bench_config("bench_throughput", [*SMALL, *more], verbatim=("model", "out"))


def test_loads_have_the_lengths_asked_for_and_share_the_prefix(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    loads = loads_of(settings(), tokenizer, context=160)
    assert list(loads) == ["once", "few", "poisson", "prefix"]
    once, few, prefix = loads["once"], loads["few"], loads["prefix"]
    assert all(5 <= len(call.prompt) <= 20 and 2 <= call.answer <= 6 for call in once.calls)
    assert few.calls == once.calls and (few.at_a_time, once.at_a_time) == (2, 64)
    assert len({call.prompt[:24] for call in prefix.calls}) == 1
    assert len({call.prompt[24:] for call in prefix.calls}) == 5
    assert loads == loads_of(settings(), tokenizer, context=160)  # by the seed
    with pytest.raises(DeliberateError, match="more than the context of 20"):
        loads_of(settings(), tokenizer, context=20)


def test_one_prompt_in_ten_of_the_mixed_load_is_long(checkpoint):
    more = ("loads=[mixed]", "requests=20", "long_tokens=[40,50]")
    load = loads_of(settings(*more), load_tokenizer(checkpoint), context=160)["mixed"]
    lengths = [len(call.prompt) for call in load.calls]
    assert sum(40 <= length <= 50 for length in lengths) == 2
    assert sum(5 <= length <= 20 for length in lengths) == 18


def test_poisson_arrivals_have_the_rate_asked_for():
    load = arriving(Load("poisson", (Call((1,), 1),) * 4000, 8), rate=50.0, seed=0)
    times = [call.arrival for call in load.calls]
    assert times[0] == 0.0 and times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(50.0, rel=0.05)


def test_requests_are_taken_when_they_have_arrived_and_not_before():
    now = [10.0]
    calls = tuple(Call((1,), 1, arrival) for arrival in (0.0, 0.0, 0.5, 2.0))
    arrivals = Arrivals(Load("x", calls, 8), clock=lambda: now[0])
    assert arrivals.take(1) == [0]
    assert arrivals.take() == [1]
    now[0] = 10.5
    assert arrivals.take() == [2] and arrivals.take() == [] and not arrivals.over
    now[0] = 12.0
    assert arrivals.take() == [3] and arrivals.over


def test_a_closed_batch_is_cut_to_each_requests_own_length():
    batches = []

    def decode(calls):
        batches.append(len(calls))
        longest = max(call.answer for call in calls)
        return [[7] * longest] * len(calls), [[0.1 * i for i in range(longest)]] * len(calls), 100

    calls = tuple(Call((1, 2), answer) for answer in (3, 1, 2))
    served = StaticServer(decode, size=2).serve(Load("x", calls, 8))
    assert batches == [2, 1]
    assert [len(tokens) for tokens in served.tokens] == [3, 1, 2]
    assert served.prefilled == 6 and (served.kv_bytes, served.kv_tokens) == (100, 8)


def test_figures_of_a_load_by_hand():
    load = Load("x", (Call((1, 2, 3), 2), Call((1,), 3, arrival=1.0)), 8)
    fast, slow, broken = Rounds(), Rounds(), Rounds(failure="ValueError: no")
    times = [[0.5, 1.0], [1.5, 1.7, 2.0]]
    counts = {"prefilled": 1, "kv_bytes": 60, "kv_tokens": 5}
    fast.add(load, Served([[1, 2], [3, 4, 5]], times, 1.0, **counts))
    slow.add(load, Served([[1, 2], [3, 4, 9]], [[1.0, 2.0], [4.0, 4.5, 5.0]], 3.0))
    named = {"static dense": fast, "transformers static": slow, "transformers continuous": broken}
    figures = report(load, named, token_bytes=10, seed=0)
    rows = figures["variants"]
    assert rows["static dense"]["tokens_per_second"] == [2.5]
    assert rows["static dense"]["first_token_ms"]["p50"] == pytest.approx(500.0)
    assert rows["static dense"]["between_tokens_ms"]["p50"] == pytest.approx(300.0)
    assert rows["static dense"]["prefill_saved"] == pytest.approx(0.75)
    assert rows["static dense"]["kv_over_own"] == pytest.approx(1.2)
    assert (rows["static dense"]["identical"], rows["transformers static"]["identical"]) == (2, 1)
    assert rows["transformers continuous"] == {"failure": "ValueError: no"}
    (ratio,) = figures["ratios"]
    assert ratio["throughput"]["value"] == pytest.approx(2.5)
    assert ratio["processor"]["value"] == pytest.approx(3.0)
    assert ratio["first_token"]["value"] == pytest.approx(2.0 / 0.5)


def test_bytes_per_token_are_those_of_keys_and_values(checkpoint):
    model = AdaptiveModel.from_pretrained(str(checkpoint), executor="generic")
    cache = model.base(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert bytes_per_token(model) == held // 3


def test_transformers_continuous_batching_gives_the_tokens_of_a_closed_batch(checkpoint):
    model = AdaptiveModel.from_pretrained(str(checkpoint), executor="generic")
    calls = (Call((5, 6, 7), 4), Call((9, 8), 6, arrival=0.05), Call((11,) * 20, 2))
    load = Load("x", tuple(sorted(calls, key=lambda call: call.arrival)), 2)
    theirs = TransformersContinuous(model, attention="sdpa", page_size=16, max_batch_tokens=64)
    served = theirs.serve(load)
    assert served.tokens == StaticServer(static_dense(model), 3).serve(load).tokens
    assert [len(times) for times in served.times] == [call.answer for call in load.calls]
    assert served.times[2][0] >= 0.05 and all(times == sorted(times) for times in served.times)


def test_an_engine_in_blocks_runs_a_shared_prefix_once(checkpoint):
    model = AdaptiveModel.from_pretrained(str(checkpoint), executor="generic")
    prefix = tuple(range(5, 29))
    load = Load("prefix", tuple(Call((*prefix, 40 + n), 3) for n in range(4)), 8)
    spec = DecodingSpec(fidelity="dense")
    shared = EngineServer(model, spec, block_tokens=8).serve(load)
    unshared = EngineServer(model, spec).serve(load)
    assert shared.tokens == unshared.tokens
    assert (shared.prefilled, unshared.prefilled) == (24 + 4, 4 * 25)


def test_the_command_serves_every_load_and_names_a_rival_that_fails(
    checkpoint, tmp_path, monkeypatch, capsys
):
    class Broken:
        def serve(self, load):
            raise RuntimeError("no kernel\nfor this machine")

    servers = {**throughput.SERVERS, "transformers continuous": lambda model, cfg: Broken()}
    monkeypatch.setattr(throughput, "SERVERS", servers)
    out = tmp_path / "throughput.json"
    run_benchmark(["throughput", f"model={checkpoint}", f"out={out}", *SMALL, "requests=3"])
    record = json.loads(out.read_text())
    assert list(record["loads"]) == ["once", "few", "poisson", "prefix"]
    for load in record["loads"].values():
        rows = load["variants"]
        assert rows["transformers continuous"]["failure"] == (
            "RuntimeError: no kernel for this machine"
        )
        assert load["identical_to"] == "engine dense"
        for variant in ("engine exact", "static dense", "transformers static"):
            assert rows[variant]["identical"] == 3
        assert rows["engine exact"]["layers_per_token"] > 0
    assert record["loads"]["poisson"]["last_arrival"] > 0
    assert record["command"].startswith("deliberate bench throughput")
    assert "transformers continuous failed: RuntimeError: no kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("variants=[vllm]", "vllm"),
        ("loads=[]", "loads is empty"),
        ("answer_tokens=[5,2]", r"answer_tokens=\[5, 2\]"),
        ("rate=0", "rate=0"),
        ("requests=1", "requests=1"),
    ],
)
def test_a_setting_that_cannot_work_is_named(wrong, named):
    with pytest.raises(DeliberateError, match=named):
        run_benchmark(["throughput", wrong])
