"""`deliberate bench rate online=`: a plan is decoded on problems that no table knows."""

from __future__ import annotations

import dataclasses
import json

import pytest

from deliberate.eval.benchmarks.rate_online import Levels, Plan
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet
from deliberate.utils.errors import DeliberateError

SMALL = (
    "model=tiny-chain",
    "task.size=4",
    "places.chunk=32",
    "places.switches=[]",
    "rules=[]",
    "cuts=[]",
    "resamples=0",
    "timed=2",
    "batch=3",
    "exact=false",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Greedy chains of a few problems, by two fidelities."""
    found = []
    for fidelity in ("dense", "exact"):
        folder = tmp_path_factory.mktemp(fidelity)
        run_benchmark(["chains", *SMALL, f"fidelity={fidelity}", "seed=2", f"out={folder}"])
        found.append(folder / "chains.jsonl")
    return found


def test_chains_by_exact_mode_are_those_of_dense_and_say_how_they_were_decoded(files):
    dense, exact = (ChainSet.load(one) for one in files)
    assert [one.tokens for one in dense.chains] == [one.tokens for one in exact.chains]
    assert (dense.header.fidelity, exact.header.fidelity) == ("dense", "exact")
    assert dense.header.conditions == exact.header.conditions


def test_a_plan_is_decoded_on_fresh_problems_and_not_on_known_ones(files, tmp_path, capsys):
    given = []
    for path, token in zip(files, (2e-3, 1e-3), strict=True):
        one = ChainSet.load(path)
        header = dataclasses.replace(one.header, costs=ChainCosts(token, 2e-3))
        given.append(tmp_path / path.parent.name)
        ChainSet(header, one.chains).save(given[-1])
    chains = "chains=[" + ",".join(f"'{one}'" for one in given) + "]"
    out = tmp_path / "out"
    run_benchmark(["rate", chains, "budgets=2", "online=2", "seed=9", f"out={out}"])
    assert "by the wall clock" in capsys.readouterr().out
    rows = json.loads((out / "rate.json").read_text())["online"]
    assert {"one rate", "depth alone"} <= {row["name"] for row in rows}
    first = rows[0]
    assert first["name"] == "one rate" and "exact" in first["setting"]
    assert all((row["seconds"] > 0) == (row["chains"] > 0) for row in rows)
    assert first["chains"] == 1.0 and first["seconds"] > 0
    # A level that answers a share of the problems leaves the others at once.
    plan = Plan("depth alone", "unanswered; 50% exact", None, Levels("exact"), 0.5)
    assert {plan.of(number) for number in range(20)} == {None, Levels("exact")}
    with pytest.raises(Exception, match="the tables have seen all of these problems"):
        run_benchmark(["rate", chains, "budgets=2", "online=2", "seed=2"])


def test_recorded_chains_are_measured_anew_by_the_model_that_made_them(files, tmp_path):
    given = ("chains", *SMALL, "seed=2", "retime=true", f"chains={files[0]}")
    run_benchmark([*given, "fidelity=exact", "limit=3", f"out={tmp_path / 'exact'}"])
    before, after = (ChainSet.load(one) for one in (files[0], tmp_path / "exact" / "chains.jsonl"))
    assert after.header.costs != before.header.costs and after.header.fidelity == "exact"
    assert after.chains == before.chains[:3]
    for other, said in (
        ("fidelity=threshold", "only dense and exact write the same"),
        ("task.max_new_tokens=400", "made with max_new_tokens=576, not 400"),
        ("samples=2", "sampling='greedy'"),
        ("seed=3", "give the seed="),
        ("timed=0", "measures nothing"),
        ("model=tiny", "name the model that made them"),
    ):
        with pytest.raises(DeliberateError, match=said):
            run_benchmark([*given, other])
    with pytest.raises(DeliberateError, match="give their file"):
        run_benchmark(["chains", *SMALL, "retime=true"])
