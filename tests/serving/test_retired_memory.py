"""The engine of a version that was swapped goes with its last request, not with a collection."""

from __future__ import annotations

import gc
import weakref

import httpx
from live_server import running, wait_until
from versioned_server import versioned


def test_a_retired_engine_is_freed_without_the_garbage_collector(tmp_path) -> None:
    server = versioned(tmp_path)
    gc.collect()
    gc.disable()
    try:
        with running(server) as url, httpx.Client(base_url=url, timeout=60) as client:
            engines = []
            for fidelity in ("dense", "exact", "threshold"):
                body = {"model": "tiny", "prompt": "one", "max_tokens": 8}
                assert client.post("/v1/completions", json=body).status_code == 200
                engines.append(weakref.ref(server.versions.live.service._engine))
                why = {"reason": "memory"}
                made = client.post("/admin/versions", json={"fidelity": fidelity} | why)
                path = f"/admin/versions/{made.json()['id']}/promote"
                assert client.post(path, json=why).status_code == 200
            assert wait_until(lambda: all(one() is None for one in engines))
    finally:
        gc.enable()
