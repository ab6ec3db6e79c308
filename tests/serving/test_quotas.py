"""Limits of one client: requests and tokens a minute, requests at a time."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import running, wait_until

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.command import build_server
from deliberate.serving.errors import ApiError
from deliberate.serving.quotas import Quotas, client_of
from deliberate.serving.settings import QuotaSettings, ServerSettings
from deliberate.utils.errors import DeliberateError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


EVENTS = st.lists(
    st.tuples(st.floats(0, 20), st.sampled_from("ab"), st.integers(1, 60)), max_size=60
)


@given(EVENTS, st.integers(1, 10), st.integers(60, 200))
@settings(max_examples=100, deadline=None)
def test_no_client_gets_more_than_twice_its_limit_in_a_minute_and_waits_as_told(
    events, requests, tokens
) -> None:
    clock = Clock()
    quotas = Quotas(QuotaSettings(requests=requests, tokens=tokens), clock)
    taken: dict[str, list[tuple[float, int]]] = {"a": [], "b": []}
    for passed, client, amount in events:
        clock.now += passed
        try:
            use = quotas.enter(client)
            use.take(amount)
        except ApiError as error:
            assert error.status == 429 and error.retry_after >= 1
            continue
        use.close()
        taken[client].append((clock.now, amount))
        minute = [one for at, one in taken[client] if at > clock.now - 60]
        assert len(minute) <= 2 * requests and sum(minute) <= 2 * tokens


def test_a_refused_client_succeeds_after_the_seconds_that_it_was_told() -> None:
    clock = Clock()
    quotas = Quotas(QuotaSettings(tokens=60), clock)
    quotas.enter("a").take(50)
    with pytest.raises(ApiError) as refused:
        quotas.enter("a").take(30)
    assert refused.value.retry_after == 20
    quotas.enter("b").take(60)  # another client has its own
    clock.now += 20
    quotas.enter("a").take(30)
    with pytest.raises(ApiError) as never:
        quotas.enter("a").take(61)
    assert never.value.status == 400 and "61 tokens" in never.value.message


def test_tokens_that_an_answer_did_not_use_are_given_back() -> None:
    quotas = Quotas(QuotaSettings(tokens=60), Clock())
    use = quotas.enter("a")
    use.take(60)
    use.used(10)
    use.used(10)  # once
    quotas.enter("a").take(50)
    with pytest.raises(ApiError, match="60 tokens a minute"):
        quotas.enter("a").take(1)


def test_a_key_counts_where_keys_are_set_and_is_not_kept_as_it_is() -> None:
    one, two = (client_of(f"Bearer {key}", "10.0.0.1", keys=True) for key in ("secret", "other"))
    assert one != two and "secret" not in one
    assert client_of("Bearer secret", "10.0.0.1", keys=False) == "address:10.0.0.1"


@pytest.mark.parametrize("name", ["requests", "tokens", "concurrent"])
def test_a_limit_below_one_is_refused(name) -> None:
    with pytest.raises(DeliberateError, match=f"quota of {name} 0"):
        QuotaSettings(**{name: 0})


def test_a_client_over_its_limit_is_answered_429_and_another_is_not() -> None:
    quota = QuotaSettings(requests=2, concurrent=1)
    chosen = ServerSettings(quota=quota, api_keys=("one", "two"))
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    server = build_server(model, tokenizer, "tiny", chosen)
    server.builder.end_tokens = ()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0}
    with running(server) as url:

        def ask(key: str, **given):
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.post(f"{url}/v1/completions", json=body | given, headers=headers)

        long = body | {"stream": True, "max_tokens": 900, "n": 8, "fidelity": "dense"}
        headers = {"Authorization": "Bearer one"}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, headers=headers) as answer:
            lines = answer.iter_lines()
            next(lines)
            refused = ask("one")
            assert refused.status_code == 429 and "at a time" in refused.json()["error"]["message"]
            assert ask("two").status_code == 200
        assert wait_until(lambda: server.service.unfinished == 0)
        assert [ask("one").status_code for _ in range(2)] == [200, 429]
        assert 1 <= int(ask("one").headers["retry-after"]) <= 30
        assert ask("two").status_code == 200
