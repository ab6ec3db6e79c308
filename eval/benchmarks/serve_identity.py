"""Whether the same requests get the same answers alone, in an engine, and over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from omegaconf import DictConfig

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.serve_client import Client, Outcome
from deliberate.eval.benchmarks.serve_figures import spread
from deliberate.eval.benchmarks.serve_load import Shot, shots
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

_WARM = 2  # requests of `overhead` that are not counted


class FirstText:
    """A connection by the standard library alone, whose own time is small.

    Args:
        url: of the server.
        api_key: sent with every request.
        timeout: seconds.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def __enter__(self) -> FirstText:
        self._connection.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def seconds(self, body: dict[str, Any]) -> float:
        """Until the first text of a streamed completion.

        Raises:
            DeliberateError: it fails.
        """
        text, first = json.dumps(body), None
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", text, self._headers)
        answer = self._connection.getresponse()
        while line := answer.readline():
            if first is None and line.startswith(b"data: {"):
                event = parse_json(line[6:].decode(), "an event of the server")
                if any(choice.get("text") for choice in event.get("choices", ())):
                    first = time.perf_counter() - began
        if first is None:
            raise DeliberateError(f"a request failed over HTTP: status {answer.status}")
        return first


def requests(cfg: DictConfig, tokenizer: Any, context: int | None) -> list[Shot]:
    """Requests of the mix without deadlines, all with the same limit."""
    source = itertools.islice(shots(cfg, tokenizer, context), cfg.identity.requests)
    limit = cfg.identity.max_tokens
    return [dataclasses.replace(one, max_tokens=limit, deadline_ms=None) for one in source]


def alone(
    model: AdaptiveModel, given: Sequence[Shot], fidelity: str, ends: tuple[int, ...]
) -> list[list[int]]:
    """Tokens of each answer by `generate`, one request after the other."""
    made = []
    for one in given:
        ids = torch.tensor([one.prompt], device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=one.max_tokens,
            do_sample=False,
            fidelity=fidelity,
            eos_token_id=list(ends),
        )
        made.append(output[0, ids.shape[1] :].tolist())
    return made


def in_engine(
    model: AdaptiveModel,
    given: Sequence[Shot],
    fidelity: str,
    ends: tuple[int, ...],
    running: int,
) -> list[list[int]]:
    """The same by an engine, all requests at once, `running` of them decoded at a time."""
    engine = model.engine(max_running=running)
    spec = DecodingSpec(fidelity=Fidelity(fidelity))
    numbers = {
        engine.add(Request(one.prompt, one.max_tokens, spec=spec, end_tokens=ends)): index
        for index, one in enumerate(given)
    }
    made: list[list[int]] = [[] for _ in given]
    while engine.unfinished:
        for output in engine.step():
            made[numbers[output.id]] += output.tokens
    return made


async def over_http(client: Client, given: Sequence[Shot], clients: int) -> list[Outcome]:
    """The same by the server, `clients` requests at a time, in the order of `given`."""
    gate = asyncio.Semaphore(clients)
    began = time.perf_counter()

    async def one(shot: Shot) -> Outcome:
        async with gate:
            return await client.send(shot, began, 0.0)

    return list(await asyncio.gather(*(one(shot) for shot in given)))


def overhead(model: AdaptiveModel, tokenizer: Any, url: str, cfg: DictConfig) -> dict[str, Any]:
    """Seconds to the first token of lone requests: in an engine here, over HTTP by a plain
    connection, and by the client of the other loads, in turn."""
    given = requests(cfg, tokenizer, model.backbone.max_positions)
    ends = tuple(end_tokens(model.generation_config, tokenizer))
    spec = DecodingSpec(fidelity=Fidelity.DENSE)
    engine = model.engine(max_running=cfg.clients)

    def first_in_engine(one: Shot) -> float:
        began = time.perf_counter()
        engine.add(Request(one.prompt, one.max_tokens, spec=spec, end_tokens=ends))
        while not any(output.tokens for output in engine.step()):
            pass
        seconds = time.perf_counter() - began
        while engine.unfinished:
            engine.step()
        return seconds

    async def each() -> list[tuple[float, float, float]]:
        async with Client(
            url, timeout=cfg.timeout, api_key=cfg.api_key, fidelity="dense"
        ) as client:
            made = []
            for index, one in enumerate(given):
                here = first_in_engine(one)
                # Whichever asks second meets a server that has just read the same prompt.
                if index % 2:
                    plain = plainly.seconds(client.body(one))
                served = await client.send(one, time.perf_counter(), 0.0)
                if served.first is None:
                    raise DeliberateError(f"a request failed over HTTP: {served.error}")
                if not index % 2:
                    plain = plainly.seconds(client.body(one))
                if index >= _WARM:
                    made.append((here, plain, served.first))
            return made

    with FirstText(url, cfg.api_key, cfg.timeout) as plainly:
        found = asyncio.run(each())
    samples = {
        "engine": [here for here, _, _ in found],
        "http": [served for _, _, served in found],
        "server": [plain - here for here, plain, _ in found],
        "client": [served - plain for _, plain, served in found],
        "added": [served - here for here, _, served in found],
    }
    return {"requests": len(found)} | {name: spread(own) for name, own in samples.items()}


def compare(
    model: AdaptiveModel, tokenizer: Any, url: str, cfg: DictConfig
) -> dict[str, dict[str, Any]]:
    """Counts of identical answers, by fidelity.

    Raises:
        DeliberateError: a request failed over HTTP.
    """
    given = requests(cfg, tokenizer, model.backbone.max_positions)
    ends = tuple(end_tokens(model.generation_config, tokenizer))
    made = {}
    for fidelity in cfg.identity.fidelities:
        expected = alone(model, given, fidelity, ends)
        engine = in_engine(model, given, fidelity, ends, cfg.clients)

        async def ask(name: str = fidelity) -> list[Outcome]:
            async with Client(
                url, timeout=cfg.timeout, api_key=cfg.api_key, fidelity=name
            ) as client:
                return await over_http(client, given, cfg.clients)

        served = asyncio.run(ask())
        failed = [one for one in served if not one.answered]
        if failed:
            raise DeliberateError(f"{len(failed)} requests failed over HTTP: {failed[0].error}")
        texts = [
            tokenizer.decode(one, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for one in expected
        ]
        made[fidelity] = {
            "requests": len(given),
            "engine": sum(a == b for a, b in zip(engine, expected, strict=True)),
            "http": sum(
                one.text == text and one.tokens == len(tokens)
                for one, text, tokens in zip(served, texts, expected, strict=True)
            ),
        }
    return made
