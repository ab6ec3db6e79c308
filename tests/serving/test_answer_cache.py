"""Equal requests get the answer that was given before; never another's, and never an old one."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from live_server import held, running, wait_until

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

HTTP = httpx.Client()  # making one takes longer than an answer
QUESTION = "Question: Tom has {} apples and buys 4 more. How many apples does Tom have?\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


@pytest.fixture
def model():
    return AdaptiveModel.from_pretrained("tiny")


def served(model, tokenizer, **settings):
    return build_server(
        model, tokenizer, "tiny", ServerSettings(**{"cache_entries": 64} | settings)
    )


def ask(url, number=3, **given):
    body = {"model": "tiny", "prompt": QUESTION.format(number), "max_tokens": 24, "temperature": 0}
    return HTTP.post(f"{url}/v1/completions", json=body | given)


def text(answer) -> str:
    return answer.json()["choices"][0]["text"]


def cached(answer):
    return answer.json()["deliberate"]["cache"]


def test_an_equal_request_gets_the_same_answer_without_decoding(model, tokenizer) -> None:
    server = served(model, tokenizer)
    with running(server) as url:
        first = ask(url)
        tokens = server.service.stats.tokens
        second = ask(url, user="another", priority=3, metadata={"a": "b"}, deadline_ms=60_000)
        assert (cached(first), cached(second)) == ("miss", "hit")
        for name in ("choices", "usage"):
            assert first.json()[name] == second.json()[name]
        for name in ("exit_layers", "layers_per_token", "fidelity", "drafted"):
            assert first.json()["deliberate"][name] == second.json()["deliberate"][name]
        assert (
            second.json()["deliberate"]["deadline_met"]
            and first.json()["id"] != second.json()["id"]
        )
        streamed = ask(url, stream=True)
        assert '"cache":"hit"' in streamed.text and "data: [DONE]" in streamed.text
        assert server.service.stats.tokens == tokens


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": QUESTION.format(4)},
        {"max_tokens": 23},
        {"fidelity": "dense"},
        {"stop": "the"},
        {"repetition_penalty": 1.2},
        {"n": 2},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"temperature": 1.0, "seed": 1},
    ],
)
def test_what_changes_an_answer_is_another_key(model, tokenizer, changed) -> None:
    with running(served(model, tokenizer)) as url:
        ask(url)
        assert cached(ask(url, **changed)) == "miss"
        assert cached(ask(url, **changed)) == "hit"
        assert cached(ask(url)) == "hit"


def test_sampling_without_a_seed_is_never_kept_and_with_one_it_is(model, tokenizer) -> None:
    with running(served(model, tokenizer)) as url:
        free = [ask(url, temperature=1.5) for _ in range(4)]
        assert {cached(one) for one in free} == {None} and len({text(one) for one in free}) > 1
        first, second = (ask(url, temperature=1.5, seed=7) for _ in range(2))
        assert text(first) == text(second) and cached(second) == "hit"


def test_equal_requests_on_their_way_are_decoded_once_whoever_goes_away(model, tokenizer) -> None:
    server = served(model, tokenizer)
    server.builder.end_tokens = ()
    with running(server) as url, ThreadPoolExecutor(8) as pool:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "seed": 1, "temperature": 2.0}
        with (
            held(server.service, after=8),
            httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as leader,
        ):
            of_leader = leader.iter_lines()
            next(of_leader)
            others = [pool.submit(ask, url, **body, stream=k % 2 == 0) for k in range(8)]
            assert wait_until(lambda: server.completions.cache.counts.shared == 8)
        # The first client has gone; the others get all of it.
        made = [one.result() for one in others]
        assert server.service.stats.added == 1 and server.service.stats.aborted == 0
        whole = [one.json() for one in made[1::2]]
        assert {one["choices"][0]["text"] for one in whole} == {whole[0]["choices"][0]["text"]}
        assert {one["deliberate"]["cache"] for one in whole} == {"shared"}
        assert all("[DONE]" in one.text and one.text.count("data: ") > 5 for one in made[::2])
        assert ask(url, **body).json()["choices"] == whole[0]["choices"]


def test_when_all_of_them_go_it_is_given_up_and_not_kept(model, tokenizer) -> None:
    server = served(model, tokenizer)
    server.builder.end_tokens = ()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "seed": 1, "stream": True}
    with running(server) as url:
        with (
            held(server.service, after=8),
            httpx.stream("POST", f"{url}/v1/completions", json=body) as one,
        ):
            of_one = one.iter_lines()
            next(of_one)
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as two:
                of_two = two.iter_lines()
                next(of_two)
        assert wait_until(lambda: server.service.stats.aborted == 1)
        assert wait_until(lambda: not server.completions._flights)
        assert not server.completions.cache._kept


def test_an_answer_that_the_time_limit_cut_is_not_kept(model, tokenizer) -> None:
    server = served(model, tokenizer, timeout_seconds=0.1)
    server.builder.end_tokens = ()
    with running(server) as url:
        body = {"prompt": "a", "max_tokens": 4000, "seed": 3, "temperature": 2}
        assert cached(ask(url, **body)) == "miss"
        assert cached(ask(url, **body)) == "miss"


def test_no_answer_is_stale_over_a_hundred_changes_of_weights(model, tokenizer) -> None:
    server, weight = served(model, tokenizer), model.base.lm_head.weight
    kept = [weight.detach().clone(), weight.detach().roll(1, 0)]
    expected, hits = [], 0
    with running(server) as url:
        for change in range(100):
            with torch.no_grad():
                weight.copy_(kept[change % 2])
            answer = ask(url, max_tokens=4)
            hits += cached(answer) == "hit"
            if len(expected) < 2:
                expected.append(text(answer))
            assert text(answer) == expected[change % 2]
    assert expected[0] != expected[1] and hits == 98


def test_the_least_recently_used_answer_goes_first_and_none_is_kept_too_long() -> None:
    now = [0.0]
    cache = AnswerCache(entries=2, seconds=10, clock=lambda: now[0])
    cache._kept["a"], cache._kept["b"] = "[]", "[]"
    cache._kept.get("a")
    cache._kept["c"] = "[]"
    assert set(cache._kept) == {"a", "c"}
    now[0] = 11.0
    assert "a" not in cache._kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_entries": -1}, "cache_entries -1"),
        ({"redis_url": "redis://localhost"}, "redis_url without cache_entries"),
        ({"cache_entries": 3, "cache_seconds": 0}, "cache_seconds 0"),
    ],
)
def test_settings_of_the_cache_are_checked(given, message) -> None:
    with pytest.raises(DeliberateError, match=message):
        ServerSettings(**given)


# -- Redis ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program, "--port", str(port), "--save", "", "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        cwd=tmp_path_factory.mktemp("redis"),
    )
    try:
        assert wait_until(lambda: listening(port))
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def listening(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_two_servers_share_answers_by_redis(model, tokenizer, redis_url) -> None:
    first, second = (served(model, tokenizer, redis_url=redis_url) for _ in range(2))
    with running(first) as url, running(second) as other:
        seed = {"seed": random.randrange(1 << 30), "temperature": 0.5}
        made = ask(url, **seed)
        assert cached(made) == "miss"
        assert wait_until(lambda: not first.completions.cache._writes)
        found = ask(other, **seed)
        assert cached(found) == "hit" and found.json()["choices"] == made.json()["choices"]
        assert second.completions.cache.counts.redis == 1 and second.service.stats.added == 0
        ask(other, **seed)
        assert second.completions.cache.counts.local == 1


def test_a_value_that_cannot_be_read_is_a_miss(model, tokenizer, redis_url) -> None:
    import redis

    server = served(model, tokenizer, redis_url=redis_url)
    with running(server) as url, redis.Redis.from_url(redis_url) as client:
        seed = {"seed": random.randrange(1 << 30), "temperature": 0.5}
        ask(url, **seed)
        assert wait_until(lambda: not server.completions.cache._writes)
        for key in client.scan_iter("deliberate:answer:*"):
            client.set(key, b'[{"text": 3')
        server.completions.cache._kept.clear()
        assert cached(ask(url, **seed)) == "miss"


@pytest.mark.parametrize("slow", [False, True])
def test_a_redis_that_is_down_or_slow_fails_no_request(model, tokenizer, slow) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if slow:
            hole.listen()  # accepts, and never answers
        url_of_it = f"redis://127.0.0.1:{hole.getsockname()[1]}"
        server = served(model, tokenizer, redis_url=url_of_it)
        with running(server) as url:
            assert [cached(ask(url, n)) for n in (3, 4, 5, 3)] == ["miss", "miss", "miss", "hit"]
            assert server.completions.cache.counts.errors == 1  # then it is left alone
