"""`deliberate bench swaps`: versions of every kind change under load; mixed answers are seen."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from live_server import running
from versioned_server import versioned

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.eval.benchmarks.swap_versions import make_variants
from deliberate.eval.benchmarks.swaps import Swapping
from deliberate.lifecycle.version import Kind
from deliberate.serving.served_version import ServedVersion
from deliberate.utils.errors import DeliberateError


def settings(*more):
    given = ["swaps=10", "questions=4", "clients=3", *more]
    return bench_config("bench_swaps", given, verbatim=("model", "out"))


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return make_variants("tiny", tmp_path_factory.mktemp("versions"), 0, 0.5)


def test_versions_of_every_kind_are_swapped_and_none_of_their_answers_is_mixed(
    tmp_path, variants, monkeypatch
) -> None:
    assert {one.kind for one in variants} == set(Kind)
    server = versioned(tmp_path)

    async def work(url):
        async with httpx.AsyncClient(base_url=url) as http:
            swapping = Swapping(settings(), http, variants)
            await swapping.learn()
            counts = await swapping.run()
            kinds = [one.kind for one in server.life_cycle.registry.versions()[1:]]
            # A fault of the server: requests no longer get their version's own settings.
            monkeypatch.setattr(ServedVersion, "with_defaults", lambda self, body: body)
            swapping._counts = type(counts)()
            return counts, kinds, await swapping.run()

    with running(server) as url:
        counts, kinds, faulty = asyncio.run(work(url))
    assert not counts.wrong, counts.line()
    assert counts.swaps == {"policy": 2, "exits": 2, "adapter": 2, "weights": 4}
    assert counts.answered >= 10 and 0 < counts.streamed < counts.answered
    assert len(counts.versions) >= 5
    assert set(kinds) == set(Kind)  # as the registry calls them
    assert faulty.mixed and faulty.wrong and "version" in faulty.notes[0]


def test_an_adapters_folder_is_loaded_as_a_version_with_its_own_answers(variants) -> None:
    (adapter,) = [one for one in variants if one.kind == Kind.ADAPTER]
    made, base = (AdaptiveModel.from_pretrained(n) for n in (adapter.changes["model"], "tiny"))
    assert made.exit_config == base.exit_config
    assert made.fingerprints()[0] != base.fingerprints()[0]


@pytest.mark.parametrize("given", ["swaps=0", "noise=0", "clients=0"])
def test_settings_that_cannot_work_are_refused_by_name(given) -> None:
    with pytest.raises(DeliberateError, match=given.split("=")[0]):
        run_benchmark(["swaps", given])
