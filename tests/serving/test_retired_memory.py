"""The memory of a version that was swapped goes with its last request, not with a collection."""

from __future__ import annotations

import gc
import logging
import weakref

import httpx
import pytest
from live_server import running, wait_until
from versioned_server import save_other_weights, versioned

BODY = {"model": "tiny", "prompt": "one", "max_tokens": 8}


def ask_in_all_ways(client: httpx.Client) -> None:
    """Whole, several, streamed, of a form, refused; and one whose client goes away."""
    path = "/v1/completions"
    for more in ({}, {"n": 2, "seed": 1}, {"temperature": 0}):
        assert client.post(path, json=BODY | more).status_code == 200
    assert client.post(path, json=BODY | {"max_tokens": 10**9}).status_code == 400
    with client.stream("POST", path, json=BODY | {"stream": True}) as stream:
        assert list(stream.iter_lines())[-2] == "data: [DONE]"
    long = BODY | {"stream": True, "max_tokens": 512}
    with httpx.Client(base_url=client.base_url) as own, own.stream("POST", path, json=long) as cut:
        next(cut.iter_lines())


def promote(client: httpx.Client, **changes) -> None:
    why = {"reason": "memory"}
    made = client.post("/admin/versions", json=changes | why)
    promoted = client.post(f"/admin/versions/{made.json()['id']}/promote", json=why)
    assert promoted.status_code == 200, promoted.text


@pytest.mark.parametrize("cache_entries", [0, 64])
def test_a_retired_version_is_freed_without_the_garbage_collector(tmp_path, cache_entries) -> None:
    other = str(save_other_weights(tmp_path / "other"))
    server = versioned(tmp_path / "registry", cache_entries=cache_entries)
    gc.collect()
    gc.disable()
    try:
        with running(server) as url, httpx.Client(base_url=url) as client:
            gone = []
            for changes in ({"fidelity": "dense"}, {"model": other}, {"fidelity": "exact"}):
                ask_in_all_ways(client)
                live = server.versions.live
                parts = [live, live.service, live.service._engine]
                if changes == {"fidelity": "exact"}:
                    changes["model"] = "tiny"  # the weights of the one before are needed no more
                    parts += [live.model, live.model.base, live.loaded]
                gone += [weakref.ref(one) for one in parts]
                del live, parts
                promote(client, **changes)
            assert wait_until(lambda: all(one() is None for one in gone))
            assert client.post("/v1/completions", json=BODY).status_code == 200
    finally:
        gc.enable()


def test_a_version_that_retires_is_not_taken_for_a_dead_engine(tmp_path, caplog) -> None:
    server = versioned(tmp_path)
    server.watchdog._every = 0.001
    with running(server) as url, httpx.Client(base_url=url) as client:
        retired = server.versions.live
        stop, seen = retired.service.stop, []

        def slowly() -> None:
            stop()
            seen.append(retired.service.trouble)
            wait_until(lambda: False, 0.1)  # the watchdog looks meanwhile

        retired.service.stop = slowly
        with caplog.at_level(logging.ERROR):
            promote(client, fidelity="dense")
            assert wait_until(lambda: server.versions.all == [server.versions.live])
    assert seen == ["the engine's thread does not run"]
    assert not caplog.records and not server.watchdog.restarts
