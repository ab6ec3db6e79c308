"""Deadlines that cannot be met are refused with the least that could be; others are taken."""

from __future__ import annotations

import math

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_plant import plant_cost
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.admission import Admission
from deliberate.serving.command import build_server
from deliberate.serving.errors import ApiError
from deliberate.serving.pace import Pace
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

TEMPLATE = None


def paced(prompt=0.001, **tokens) -> Pace:
    """10 ms a token alone, 20 with two or three requests, 40 with four to seven."""
    pace = Pace()
    for running_, seconds in {1: 0.01, 2: 0.02, 4: 0.04}.items():
        pace.note_step(running_, running_, 0, seconds)
    pace.note_step(0, 0, 100, 100 * prompt)
    return pace


def admission(**given) -> Admission:
    return Admission(paced, 4, **{"overhead": 0.0, "clock": lambda: 0.0} | given)


def enter(one: Admission, deadline_ms, prompt=100, limit=50, choices=1, arrival=0.0):
    return one.enter(prompt, limit, choices, deadline_ms, arrival)


def test_a_deadline_below_the_prompt_and_one_token_is_refused_with_the_least_that_could_be():
    with pytest.raises(ApiError) as error:
        enter(admission(), 99)
    assert error.value.status == 400
    assert "deadline_ms=99: the least that could be here is 100 ms" in error.value.message
    assert "a prompt of 1 " not in error.value.message  # it was not tokenized
    enter(admission(), 101)


def test_once_answers_are_known_their_usual_length_counts():
    one = admission()
    for tokens in (10, 11, 11, 12, 40):
        one.note_answer(tokens, 0.2)
    with pytest.raises(ApiError, match=r"the least that could be here is 200 ms.* 11 tokens"):
        enter(one, 199)
    enter(one, 201).end()
    strict = admission(share=0.9)
    for tokens in (10, 11, 11, 12, 40):
        strict.note_answer(tokens, 0.2)
    with pytest.raises(ApiError, match="490 ms"):
        enter(strict, 201)
    enter(strict, 201, limit=11)  # it asks for no more than that


def test_what_only_the_load_prevents_is_answered_429_with_when_to_try_again():
    one = admission()
    for _ in range(5):
        one.note_answer(11, 0.4)
    leave = [enter(one, None) for _ in range(3)]
    with pytest.raises(ApiError) as error:  # four at a time: 100 + 10 * 40 ms
        enter(one, 250)
    assert error.value.status == 429 and error.value.retry_after == 1
    assert "500 ms can be kept to, on an idle server 200" in error.value.message
    for end in leave:
        end.end()
    enter(one, 250)


def test_the_wait_for_a_place_counts_but_not_those_whose_deadlines_are_later():
    def filled(deadline):
        one = admission()
        for _ in range(5):
            one.note_answer(11, 1.0)
        for _ in range(20):
            enter(one, deadline)
        return one

    with pytest.raises(ApiError, match="the least") as error:
        enter(filled(None), 50)
    assert error.value.status == 400
    enter(filled(None), 900)  # it goes first: one place of four that are free every second
    with pytest.raises(ApiError, match="with 20 requests here"):  # now the others are urgent
        busy = admission()
        for _ in range(5):
            busy.note_answer(11, 1.0)
        busy._dues = dict.fromkeys(range(20), 0.5)
        enter(busy, 900)


def test_without_any_knowledge_nothing_is_refused():
    Admission(Pace, 4).enter(100, 50, 1, 0.001, 0.0)


def test_a_full_queue_is_told_when_a_place_can_be_expected():
    one = admission()
    assert one.retry_after == 1
    one.note_answer(100, 21.0)
    assert one.retry_after == math.ceil(21 / 4)


@pytest.mark.parametrize("share", [0.0, 1.0, -1, math.nan])
def test_a_share_outside_its_range_is_named(share):
    with pytest.raises(DeliberateError, match="share"):
        Admission(Pace, 4, share=share)
    with pytest.raises(DeliberateError, match="admission_share"):
        ServerSettings(admission_share=share)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(1e-4, 1.0)), min_size=1, max_size=30))
def test_a_pace_lies_within_the_steps_that_were_seen(steps):
    pace = Pace()
    for running_, seconds in steps:
        pace.note_step(running_, running_, 0, seconds)
    times = [seconds for _, seconds in steps]
    for running_ in range(1, 17):
        found = pace.token_seconds(running_)
        assert min(times) * 0.999 <= found <= max(times) * 1.001


def test_a_pace_takes_the_prompts_share_of_a_step_only():
    pace = paced()
    for _ in range(100):
        pace.note_step(2, 2, 50, 0.02 + 50 * 0.002)
    assert pace.prompt_seconds(10) == pytest.approx(0.02, rel=0.01)
    assert pace.token_seconds(2) == pytest.approx(0.02)


def test_the_cost_model_speaks_for_loads_that_were_never_seen():
    cost = plant_cost()
    pace = Pace(cost)
    alone, eight = pace.token_seconds(1), pace.token_seconds(8)
    assert alone > 0 and eight > 0 and pace.prompt_seconds(64) == cost.prompt_seconds(64)
    pace.note_step(1, 1, 0, 3 * alone)
    assert pace.token_seconds(8) == pytest.approx(3 * eight)


def test_a_server_refuses_by_rules_and_deadlines_and_serves_the_next(tmp_path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("forbidden: [{name: secret, pattern: 'xyzzy'}]\nmax_tokens: 12\n")
    model = AdaptiveModel.from_pretrained("tiny")
    settings = ServerSettings(rules=rules)
    server = build_server(model, checkpoint.load_tokenizer("tiny"), "tiny", settings)
    body = {"model": "tiny", "prompt": "Question: 2 plus 2?\nAnswer:", "temperature": 0}

    def ask(url, **given):
        return httpx.post(f"{url}/v1/completions", json=body | given)

    with running(server) as url:
        made = ask(url).json()
        assert made["usage"]["completion_tokens"] <= 12  # the rules' limit, where none is given
        assert ask(url, prompt="xyzzy").status_code == 400
        late = ask(url, deadline_ms=0.001)
        assert late.status_code == 400 and "the least that could be" in late.text
        in_time = ask(url, deadline_ms=60_000)
        assert in_time.json()["choices"] == made["choices"]
        rules.write_text("{}")
        assert ask(url, prompt="xyzzy").status_code == 200
        assert not server.completions.admission._dues


def test_the_measured_time_outside_the_engine_is_part_of_what_is_least() -> None:
    one = admission()
    enter(one, 101).end()
    one.note_answer(1, 0.2, 0.03)
    assert one.overhead == pytest.approx(0.03)
    with pytest.raises(ApiError, match="the least that could be here is 130 ms"):
        enter(one, 129)
    one.note_answer(1, 0.2, 0.05)
    assert one.overhead == pytest.approx(0.032)
    one.note_answer(1, 0.2)
    assert one.overhead == pytest.approx(0.032)


def learnt(took: float, *, later: int = 0, one: Admission | None = None) -> Admission:
    """Beside three others 500 ms were predicted and so many seconds taken; `later` more came."""
    now = [0.0]
    one = one or admission()
    one._clock = lambda: now[0]
    for _ in range(5):
        one.note_answer(11, 0.2)
    for _ in range(16):
        others = [enter(one, None) for _ in range(3)]
        now[0] = 0.0
        place = enter(one, 700)
        others += [enter(one, None) for _ in range(later)]
        now[0] = took
        place.end(finished=True)
        place.sent()
        for other in others:
            other.end()
    now[0] = 0.0
    return one


def test_predictions_that_were_too_short_make_later_ones_longer_but_not_on_an_idle_server() -> None:
    one = learnt(1.0)
    others = [enter(one, None) for _ in range(3)]
    with pytest.raises(ApiError, match="875 ms can be kept to") as error:
        enter(one, 700)
    assert error.value.status == 429
    for other in others:
        other.end()
    enter(one, 700).end()  # nobody is here: what comes later is no reason against it


def test_what_it_takes_to_send_an_answer_counts_and_one_that_is_never_sent_says_nothing() -> None:
    now = [0.0]
    one = admission(clock=lambda: now[0])
    for _ in range(5):
        one.note_answer(11, 0.2)
    others = [enter(one, None) for _ in range(3)]
    for sent in (True, False):
        for _ in range(16):
            now[0] = 0.0
            place = enter(one, 900)
            now[0] = 0.5
            place.end(finished=True)
            now[0] = 0.8 if sent else 9.0
            if sent:
                place.sent()
                place.sent()  # once is enough
        now[0] = 0.0
        with pytest.raises(ApiError, match="800 ms can be kept to"):
            enter(one, 750)
    for other in others:
        other.end()


def test_answers_are_as_long_as_those_with_a_like_limit_where_there_are_enough() -> None:
    one = admission()
    for _ in range(5):
        one.note_answer(4, 0.1, limit=4)
    enter(one, 140, limit=64).end()  # nothing is known of such: four tokens
    for _ in range(5):
        one.note_answer(41, 0.5, limit=50)
    with pytest.raises(ApiError, match=r"500 ms.* 41 tokens"):
        enter(one, 490, limit=64)
    enter(one, 140, limit=4).end()


def test_predictions_from_before_lengths_were_known_teach_nothing() -> None:
    now = [0.0]
    one = admission(clock=lambda: now[0])
    places = [enter(one, 900) for _ in range(20)]  # one token each, it seems
    for _ in range(5):
        one.note_answer(11, 0.2)
    now[0] = 0.8
    for place in places:
        place.end(finished=True)
        place.sent()
    now[0] = 0.0
    [enter(one, None) for _ in range(3)]
    enter(one, 510)


def test_a_request_is_remembered_at_the_load_that_it_has_met() -> None:
    one = learnt(1.0, later=20, one=learnt(0.5))  # slow because of those that came later
    [enter(one, None) for _ in range(3)]
    enter(one, 700)


def test_in_an_overload_the_few_with_long_deadlines_do_not_take_the_room_of_the_many() -> None:
    one = learnt(1.0)
    others = [enter(one, None) for _ in range(3)]
    with pytest.raises(ApiError, match="875 ms"):
        enter(one, 700)
    with pytest.raises(ApiError, match="shorter deadlines are being refused") as error:
        enter(one, 3000)
    assert error.value.status == 429 and error.value.retry_after == 1
    for other in others:
        other.end()
    enter(one, 3000)  # there is room for the others, too


def test_what_a_request_has_waited_before_it_is_looked_at_counts() -> None:
    now = [0.0]
    one = admission(clock=lambda: now[0])
    enter(one, 150).end()
    now[0] = 0.06
    with pytest.raises(ApiError, match="160 ms can be kept to") as error:
        enter(one, 150)
    assert error.value.status == 429


def test_a_burst_raises_the_overhead_but_not_what_an_idle_server_is_said_to_need() -> None:
    one = admission()
    for overhead in (0.01, 0.5, 0.5, 0.5, 0.5):
        one.note_answer(1, 0.2, overhead)
    with pytest.raises(ApiError) as error:
        enter(one, 140)
    assert error.value.status == 429 and one.overhead > 0.1


def test_a_place_says_until_when_its_answer_must_have_begun() -> None:
    one = admission()
    for _ in range(5):
        one.note_answer(11, 0.2)
    assert enter(one, 400).begin_by == pytest.approx(0.3)  # ten more tokens of 10 ms
    assert enter(one, None).begin_by == math.inf


def test_what_was_taken_because_answers_are_faster_than_predicted_is_not_given_up_at_once() -> None:
    one = learnt(0.25)  # half of what is predicted
    others = [enter(one, None) for _ in range(3)]
    assert enter(one, 600).begin_by == pytest.approx(0.4)  # 10 tokens of 40 ms, halved
    for other in others:
        other.end()


def test_an_answer_that_has_not_begun_when_it_must_is_given_up_with_429(model, tokenizer) -> None:
    server = build_server(model, tokenizer, "tiny", ServerSettings())
    admission_ = server.completions.admission
    plain = admission_.enter

    def late(*given):
        place = plain(*given)
        place.begin_by = min(place.begin_by, given[-1] - 1.0)
        return place

    body = {"model": "tiny", "prompt": [5, 6, 7], "deadline_ms": 60_000, "max_tokens": 4}
    with running(server) as url:
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        admission_.enter = late
        for stream in (False, True):
            answer = httpx.post(f"{url}/v1/completions", json=body | {"stream": stream})
            assert answer.status_code == 429 and answer.headers["retry-after"]
            assert "would be late" in answer.json()["error"]["message"]
        plain_body = {name: value for name, value in body.items() if name != "deadline_ms"}
        admission_.enter = plain
        assert httpx.post(f"{url}/v1/completions", json=plain_body).status_code == 200
    assert not admission_._dues


def test_a_full_server_refuses_before_it_reads_the_prompt(model, tokenizer, monkeypatch) -> None:
    server = build_server(model, tokenizer, "tiny", ServerSettings())
    builder = server.versions.live.builder
    body = {"model": "tiny", "prompt": "Question: 2 plus 2?"}
    with running(server) as url:
        # Its seconds are known once it has answered, or from a calibration of this machine.
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        monkeypatch.setattr(builder, "build", None)  # nothing of the prompt is read
        for given_ in ({"deadline_ms": 1e-6}, {}):
            if not given_:
                server.service.max_unfinished = 0
            answer = httpx.post(f"{url}/v1/completions", json=body | given_)
            assert answer.status_code in (400, 429), answer.text
            assert ("deadline_ms" in answer.text) == bool(given_)
