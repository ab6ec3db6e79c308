"""Which replica takes a request: fast ones more, none forever, and where its beginning is known."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.serving.scale.fleet import (
    Fleet,
    Job,
    Machine,
    Outage,
    by_score,
    fewest_requests,
    in_turn,
)
from deliberate.serving.scale.prefix_affinity import (
    CHUNK_CHARACTERS,
    PrefixDirectory,
    prefix_keys,
    prompt_text,
)
from deliberate.serving.scale.replica_score import (
    ReplicaState,
    RequestSize,
    ScoreWeights,
    _completed,
    predicted_seconds,
    ranked,
)
from deliberate.utils.errors import DeliberateError

SIZE = RequestSize(prompt=100, answer=50)
states = st.lists(
    st.builds(
        ReplicaState,
        name=st.just("r"),
        token_seconds=st.floats(1e-4, 1.0),
        full_token_seconds=st.floats(0.0, 4.0),
        prompt_seconds=st.floats(1e-6, 1e-2),
        answer_seconds=st.floats(1e-3, 60.0),
        free_memory=st.floats(0.0, 1.0),
        slots=st.integers(1, 32),
        unfinished=st.integers(0, 200),
        shares_prefixes=st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


def machine(speed: float = 1.0, slots: int = 4, shares: bool = False) -> Machine:
    return Machine(
        slots,
        lambda running: (0.004 + 0.001 * running) / speed,
        lambda tokens: 0.0005 * tokens / speed,
        shares,
    )


def arrivals(rate: float, seconds: float, seed: int = 0, keys=lambda n: ()) -> list[Job]:
    dice, now, made = random.Random(seed), 0.0, []
    while (now := now + dice.expovariate(rate)) < seconds:
        made.append(Job(now, 100, dice.randint(20, 80), keys(len(made))))
    return made


def p90(jobs: list[Job]) -> float:
    took = sorted(one.end - one.arrival for one in jobs)
    return took[int(0.9 * len(took))]


@given(states)
def test_a_request_never_goes_where_it_takes_more_than_the_stated_times_the_least(found) -> None:
    named = [ReplicaState(**{**vars(one), "name": f"r{n}"}) for n, one in enumerate(found)]
    matched = {one.name: n / len(named) for n, one in enumerate(named)}
    weights = ScoreWeights()
    first = ranked(named, SIZE, matched, weights)[0]
    known = {one.name: one for one in _completed(named)}
    seconds = {name: predicted_seconds(one, SIZE, matched[name]) for name, one in known.items()}
    assert seconds[first] <= weights.most_times_slower * min(seconds.values()) * (1 + 1e-9)


def test_unequal_replicas_are_used_by_their_speed() -> None:
    machines = {"slow": machine(1.0), "fast": machine(4.0)}
    took = {}
    for name, router in (("score", by_score()), ("turn", in_turn()), ("few", fewest_requests())):
        jobs = arrivals(18.0, 60.0)
        Fleet(machines, router).run(jobs)
        assert all(one.end is not None for one in jobs)
        took[name] = p90(jobs)
        if name == "score":
            assert {one.served for one in jobs} == {"slow", "fast"}
    assert took["score"] < 0.8 * took["few"] and took["score"] < 0.5 * took["turn"]


def test_a_new_replica_of_which_nothing_is_known_gets_requests() -> None:
    known = ReplicaState("old", 0.01, 0.02, 0.001, 2.0, slots=4, unfinished=4)
    assert ranked([known, ReplicaState("new", slots=4)], SIZE)[0] == "new"


def test_requests_that_come_at_once_are_spread_before_any_report_says_so() -> None:
    sent = {"a": 0, "b": 0}
    for _ in range(12):
        pair = [
            ReplicaState(name, seconds, slots=16, unfinished=sent[name])
            for name, seconds in (("a", 0.010), ("b", 0.011))
        ]
        sent[ranked(pair, SIZE)[0]] += 1
    assert min(sent.values()) >= 4


def test_among_equal_replicas_the_one_with_more_free_memory_is_first() -> None:
    pair = [ReplicaState(name, 0.01, free_memory=free) for name, free in (("a", 0.2), ("b", 0.9))]
    assert ranked(pair, SIZE) == ["b", "a"]


def test_requests_with_one_beginning_go_to_one_replica_until_it_is_full() -> None:
    keys = [prefix_keys(f"system {n} " * 100) for n in range(8)]
    machines = {f"r{n}": machine(shares=True, slots=8) for n in range(4)}
    jobs = arrivals(5.0, 100.0, keys=lambda n: keys[n % 8])
    Fleet(machines, by_score()).run(jobs)
    for n in range(8):
        homes = Counter(one.served for one in jobs[n::8])
        assert max(homes.values()) > 0.6 * homes.total(), "each beginning has a home"
    one_beginning = arrivals(60.0, 20.0, keys=lambda _: keys[0])
    Fleet(machines, by_score()).run(one_beginning)
    counts = [sum(one.served == name for one in one_beginning) for name in machines]
    assert min(counts) > 0.1 * len(one_beginning), "one beginning of all does not load one replica"


def test_known_beginnings_save_prompt_time() -> None:
    keys = [prefix_keys(f"{n} " * 400) for n in range(150)]
    took = {}
    for name, router in (("score", by_score()), ("few", fewest_requests())):
        machines = {f"r{n}": machine(shares=True, slots=8) for n in range(4)}
        jobs = arrivals(40.0, 30.0, keys=lambda n: keys[n % 150])
        Fleet(machines, router).run(jobs)
        took[name] = sum(one.first - one.arrival for one in jobs) / len(jobs)
    assert took["score"] < took["few"]


def test_a_replica_killed_every_thirty_seconds_loses_almost_no_request_with_one_retry() -> None:
    machines = {f"r{n}": machine() for n in range(3)}
    outages = [Outage(30.0 * k, f"r{k % 3}", 8.0) for k in range(1, 20)]
    lost = {}
    for tries in (1, 2):
        jobs = arrivals(18.0, 600.0)
        Fleet(machines, by_score(), ongoing=8, queued=256, tries=tries).run(jobs, outages)
        lost[tries] = sum(one.end is None for one in jobs) / len(jobs)
    assert lost[2] <= 0.005 < lost[1]


def test_what_does_not_fit_in_front_is_refused_and_the_rest_is_served() -> None:
    jobs = arrivals(200.0, 5.0)
    Fleet({"r": machine()}, by_score(), ongoing=4, queued=10).run(jobs)
    refused = [one for one in jobs if one.refused]
    assert 0 < len(refused) < len(jobs)
    assert all((one.end is None) == one.refused for one in jobs)


# -- beginnings of prompts ---------------------------------------------------------------------


def test_the_matched_share_counts_chunks_from_the_first_on() -> None:
    directory = PrefixDirectory()
    first, other = "a" * CHUNK_CHARACTERS, "b" * CHUNK_CHARACTERS
    directory.note(prefix_keys(first + other), "x")
    directory.note(prefix_keys(other + other), "y")
    matched = directory.matched(prefix_keys(first + first), ["x", "y"])
    assert matched == {"x": 0.5, "y": 0.0}
    directory.forget("x")
    assert directory.matched(prefix_keys(first), ["x", "y"]) == {"x": 0.0, "y": 0.0}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "text"}, "text"),
        ({"prompt": [1, 2]}, [1, 2]),
        ({"messages": [{"role": "user", "content": "hi"}]}, "user\0hi\0"),
        ({"messages": 3}, ""),
        ({"prompt": {"odd": 1}}, ""),
    ],
)
def test_the_beginning_of_any_body_can_be_read(body, text) -> None:
    assert prompt_text(body) == text
    prefix_keys(prompt_text(body))


def test_equal_chats_have_equal_keys_up_to_where_they_differ() -> None:
    system = {"role": "system", "content": "x" * 3 * CHUNK_CHARACTERS}
    chats = [[system, {"role": "user", "content": text}] for text in ("one", "two")]
    keys = [prefix_keys(prompt_text({"messages": chat})) for chat in chats]
    pairs = zip(*keys, strict=True)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert same == 3 and len(keys[0]) == 4


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"latency": 0.2}, "latency=0.2"),
        ({"memory": -1.0}, "memory=-1"),
    ],
)
def test_weights_that_could_overload_a_replica_are_refused(given, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        ScoreWeights(**given)
