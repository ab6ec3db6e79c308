"""The OpenAPI document says what the server does: its own answers are checked against it."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.fixture(scope="module")
def address():
    tokenizer = checkpoint.load_tokenizer("tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    settings = ServerSettings(max_new_tokens=24, default_new_tokens=8, max_choices=2)
    server = build_server(AdaptiveModel.from_pretrained("tiny"), tokenizer, "tiny", settings)
    with running(server) as url:
        yield url


def test_generated_requests_get_no_5xx_and_no_answer_that_the_document_does_not_have(
    address, tmp_path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{address}/openapi.json",
         "--phases", "coverage,fuzzing", "--max-examples", "8", "--max-failures", "5",
         "--seed", "1", "--generation-database", "none", "--request-timeout", "10",
         "--checks", ",".join(CHECKS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "6 selected / 6 total" in done.stdout and "Failures" not in done.stdout


def test_the_document_names_the_model_and_the_limits(address) -> None:
    schemas = httpx.get(f"{address}/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        assert fields["model"]["enum"] == ["tiny"] and fields["n"]["maximum"] == 2
        assert fields["max_tokens"]["anyOf"][0]["maximum"] == 24


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [("GET", "/v2", b"", 404), ("GET", "/v1/completions", b"", 405),
     ("POST", "/v1/completions", b"\xff\xfe", 400), ("POST", "/v1/completions", b"{", 400)],
)  # fmt: skip
def test_what_the_framework_refuses_has_the_form_of_openais_errors(
    address, method, path, body, status
) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.request(method, f"{address}{path}", content=body, headers=headers)
    assert answer.status_code == status
    error = json.loads(answer.text)["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    assert ("allow" in answer.headers) == (status == 405)
