"""Versions by `/admin` and the command line: promoted, rolled back, found again after SIGKILL."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
import pytest
from live_server import running, wait_until
from versioned_server import calibration, random_prompt, save_other_weights, versioned

from deliberate.cli.versions import call, swap, versions
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of other weights and of another policy."""
    folder = tmp_path_factory.mktemp("versions")
    (folder / "policy").mkdir()
    calibration().save(folder / "policy" / "calibration.json")
    return save_other_weights(folder / "weights"), folder / "policy"


def ask(url, number=0, **given) -> dict:
    body = {"model": "tiny", "prompt": random_prompt(number), "max_tokens": 16, "temperature": 0}
    made = httpx.post(f"{url}/v1/completions", json=body | given)
    assert made.status_code == 200, made.text
    return made.json()


def version(answer: dict) -> int:
    return answer["deliberate"]["version"]


def test_weights_and_policies_are_swapped_and_rolled_back_and_each_step_is_recorded(
    tmp_path, files, capsys
) -> None:
    weights, policy = files
    server = versioned(tmp_path)
    with running(server) as url:
        first = ask(url)
        swap(model=str(weights), reason="other weights", url=url)
        second = ask(url)
        assert (version(first), version(second)) == (1, 2)
        assert first["choices"][0]["text"] != second["choices"][0]["text"]
        swap(back=True, reason="worse", url=url)
        third = ask(url)
        assert version(third) == 1 and third["choices"] == first["choices"]
        swap(calibration=policy, fidelity="threshold", threshold=[0.1] * 3, url=url)
        fourth = ask(url)
        assert version(fourth) == 3 and fourth["deliberate"]["fidelity"] == "threshold"
        assert fourth["deliberate"]["layers_per_token"] < 6
        model = server.versions.live.model
        assert model.calibration.to_dict() == calibration().to_dict()
        assert wait_until(lambda: server.versions.all == [server.versions.live])
        capsys.readouterr()
        versions(url=url)
        said = capsys.readouterr().out
        found = call(url, "/admin/versions", None)
    assert [(one["id"], one["kind"], one["state"]) for one in found["versions"]] == [
        (3, "policy", "live"), (2, "weights", "rolled_back"), (1, "weights", "retired"),
    ]  # fmt: skip
    assert "rolled_back: worse (admin at 127.0.0.1)" in said and "other weights" in said
    versions(registry=tmp_path)
    assert capsys.readouterr().out == said


def test_a_policy_that_goes_live_shares_the_weights_that_are_loaded(tmp_path, files) -> None:
    server = versioned(tmp_path)
    with running(server) as url:
        base = server.versions.live.model.base
        swap(calibration=files[1], url=url)
        assert server.versions.live.number == 2 and server.versions.live.model.base is base


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "give what is to change"),
        ({"fidelity": "exact", "back": True}, "give what is to change"),
        ({"version": 9}, "there is no version 9"),
        ({"version": 1}, "version 1 is live"),
        ({"back": True}, "no earlier version to roll back to"),
        ({"model": "tiny"}, "this is what is live already"),
        ({"model": "./nowhere"}, "neither a folder nor"),
        ({"calibration": "/nowhere"}, "is missing: write it with"),
        ({"fidelity": "best"}, "best"),
        ({"fidelity": "threshold", "threshold": [0.5]}, "thresholds"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_one_line_and_changes_nothing(
    served, changes, text
) -> None:
    with pytest.raises(DeliberateError, match=text) as error:
        swap(**changes, url=served)
    assert "\n" not in str(error.value)
    assert version(ask(served)) == 1


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running(versioned(tmp_path_factory.mktemp("registry"))) as url:
        yield url


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "1.2.3.4"},
        {"Via": "1.1 proxy"},
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
    ],
)
def test_without_a_key_only_this_machine_uses_admin(served, headers) -> None:
    refused = httpx.get(f"{served}/admin/versions", headers=headers)
    assert refused.status_code == 403 and "--admin-key" in refused.json()["error"]["message"]
    assert httpx.get(f"{served}/admin/versions").status_code == 200
    assert httpx.get(f"{served}/admin/versions", headers={"Origin": served}).status_code == 200


def test_a_clients_key_is_not_the_admins(tmp_path) -> None:
    with running(versioned(tmp_path, api_keys=("client",), admin_key="admin")) as url:
        for key, status in ((None, 401), ("client", 401), ("admin", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}", "Via": "proxy"}
            assert httpx.get(f"{url}/admin/versions", headers=headers).status_code == status
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
    with pytest.raises(DeliberateError, match="admin_key without registry"):
        ServerSettings(admin_key="a")


def test_a_server_without_a_registry_says_how_to_get_one(tmp_path) -> None:
    from test_versions import SETTINGS

    from deliberate.api import checkpoint
    from deliberate.api.model import AdaptiveModel
    from deliberate.serving.command import build_server

    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    with running(build_server(model, tokenizer, "tiny", SETTINGS)) as url:
        said = httpx.post(f"{url}/admin/roll-back", json={}).json()["error"]["message"]
    assert said.endswith("start it with --registry FOLDER")
    with pytest.raises(DeliberateError, match="no server answers"):
        swap(back=True, url=url)
    with pytest.raises(DeliberateError, match="must begin with http"):
        swap(back=True, url="file:///etc/passwd")


def start(folder) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "deliberate.cli.app", "serve", "tiny", "--port", "0",
         "--registry", str(folder)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    return process, found.group()


def test_a_server_killed_after_a_swap_starts_again_with_what_was_live(tmp_path, files) -> None:
    process, url = start(tmp_path)
    try:
        swap(model=str(files[0]), url=url)
        before = ask(url)
    finally:
        process.kill()
        assert process.wait() == -9
    with running(versioned(tmp_path)) as url:
        after = ask(url)
        assert version(after) == 2 and after["choices"] == before["choices"]
    with pytest.raises(DeliberateError, match="began with model 'tiny', not 'other'"):
        from deliberate.lifecycle.version import Source
        from deliberate.serving.command import build_versioned_server

        build_versioned_server(Source("other"), "x", ServerSettings(registry=tmp_path))
