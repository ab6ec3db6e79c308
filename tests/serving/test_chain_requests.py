"""Chains of reasoning and votes over HTTP: what they answer, what they keep to, what is refused."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from live_server import PATIENCE, running, sent, wait_until

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.api.reasoner import Reasoner
from deliberate.serving.chains import GivenUp
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings

QUESTION = "Tom has {} apples and buys 4 more. How many apples does Tom have?"

# Everything triggers.
FORKS = {"action": "fork", "window": 2, "threshold": 4.0, "tokens": 6, "branches": 2}


@pytest.fixture(scope="module")
def server():
    model = AdaptiveModel.from_pretrained("tiny-chain").eval()
    return build_server(model, checkpoint.load_tokenizer("tiny-chain"), "m", ServerSettings())


@pytest.fixture(scope="module")
def address(server):
    with running(server) as url:
        yield url


def chat(address, number=3, **given):
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION.format(number)}]}
    body |= {"max_tokens": 400, "temperature": 0} | given
    return httpx.post(f"{address}/v1/chat/completions", json=body)


def made(answer) -> dict:
    assert answer.status_code == 200, answer.text
    return answer.json()


def spent(answer) -> int:
    return answer["usage"]["completion_tokens_details"]["reasoning_tokens"]


def test_a_stop_policy_ends_the_reasoning_early_and_says_so(address) -> None:
    plain, stopped = made(chat(address)), made(chat(address, reasoning={"probe": {"chunk": 16}}))
    assert spent(stopped) < spent(plain)
    message = stopped["choices"][0]["message"]
    assert message["content"].strip() and message["reasoning"] == message["reasoning_content"]
    (chain,) = stopped["deliberate"]["chains"]
    assert chain["stopped"] and chain["probes"] >= 3 and chain["probe_tokens"] > 0
    assert stopped["usage"]["completion_tokens"] > spent(stopped)
    assert "chains" not in plain["deliberate"]


@pytest.mark.parametrize("policy", ["none", "probe", "deer", {"cut": {"tokens": 20}}, "give_up"])
def test_every_policy_answers(address, policy) -> None:
    answer = chat(address, reasoning=policy)
    if policy in ("deer", "give_up") and answer.status_code == 400:
        assert "reasoning" in answer.text or policy in answer.text
        return
    assert made(answer)["choices"][0]["message"]["content"].strip()


def test_a_chain_without_a_policy_is_what_is_decoded_without_one(address) -> None:
    plain, chain = made(chat(address)), made(chat(address, reasoning="none"))
    assert plain["choices"][0]["message"] == chain["choices"][0]["message"]


def test_a_completion_is_the_whole_text(address) -> None:
    body = {"model": "m", "prompt": f"Question: {QUESTION.format(3)}\nAnswer:", "max_tokens": 400,
            "temperature": 0}  # fmt: skip
    plain, chain = (
        httpx.post(f"{address}/v1/completions", json=body | given).json()
        for given in ({}, {"reasoning": "none"})
    )
    assert plain["choices"][0]["text"] == chain["choices"][0]["text"]


def test_a_vote_gives_the_answer_of_most_chains_and_counts_all_their_tokens(address) -> None:
    answer = made(chat(address, temperature=0.8, seed=3, votes=5))
    votes = answer["deliberate"]["votes"]
    assert votes["chains"] == 5 and sum(votes["counts"]) <= 5
    assert answer["choices"][0]["message"]["content"].strip() == votes["answers"][0]
    assert answer["usage"]["completion_tokens"] == votes["tokens"] > spent(answer)
    again = made(chat(address, temperature=0.8, seed=3, votes=5))
    assert again["choices"] == answer["choices"]


def test_a_votes_budget_holds_for_all_of_its_chains_with_their_probes(address) -> None:
    votes = {"fixed": {"most": 6}, "tokens": 300}
    given = {"temperature": 0.8, "seed": 3, "reasoning": {"probe": {"chunk": 16}}, "votes": votes}
    answer = made(chat(address, **given))
    assert 1 <= answer["deliberate"]["votes"]["chains"] <= 6
    assert answer["usage"]["completion_tokens"] == answer["deliberate"]["votes"]["tokens"] <= 300
    assert answer["choices"][0]["message"]["content"].strip()


def test_several_choices_differ_by_their_seeds(address) -> None:
    answer = made(chat(address, n=3, temperature=1.0, seed=1, reasoning="none"))
    texts = {one["message"]["reasoning"] for one in answer["choices"]}
    assert len(answer["choices"]) == 3 and len(texts) > 1


@pytest.mark.parametrize("reasoning", ["none", {"probe": {"chunk": 8}}])
def test_a_budget_is_never_exceeded_and_the_answer_never_empty(address, reasoning) -> None:
    rng = random.Random(5)
    for _ in range(12):
        budget = rng.randint(0, 60)
        given = {"temperature": 0.9, "seed": rng.randrange(99)} if rng.random() < 0.5 else {}
        votes = {"votes": 2} if given and rng.random() < 0.5 else {"n": rng.choice((1, 2))}
        limit = rng.randint(30, 120)
        answer = made(
            chat(
                address,
                rng.randint(2, 9),
                reasoning=reasoning,
                thinking_token_budget=budget,
                max_tokens=limit,
                **given,
                **votes,
            )
        )
        assert answer["deliberate"]["thinking_token_budget"] == budget
        assert max(answer["deliberate"]["reasoning_tokens"]) <= budget
        assert all(one["message"]["content"].strip() for one in answer["choices"])


def test_a_stream_has_reasoning_and_answer_and_a_refusal_is_still_a_status(address) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    asked = {"model": "m", "messages": [{"role": "user", "content": QUESTION.format(3)}]}
    whole = made(chat(address, reasoning="probe"))
    reasoning = content = ""
    stream = client.chat.completions.create(
        **asked, max_tokens=400, temperature=0, stream=True, extra_body={"reasoning": "probe"},
        stream_options={"include_usage": True},
    )  # fmt: skip
    pieces = 0
    for chunk in stream:
        for one in chunk.choices:
            pieces += bool(getattr(one.delta, "reasoning_content", None))
            content += one.delta.content or ""
            reasoning += getattr(one.delta, "reasoning_content", None) or ""
        usage = chunk.usage or None
    message = whole["choices"][0]["message"]
    assert (reasoning, content) == (message["reasoning"], message["content"])
    assert usage.completion_tokens == whole["usage"]["completion_tokens"]
    assert pieces > 2  # as the chain goes on
    with pytest.raises(openai.BadRequestError, match="nothing"):
        client.chat.completions.create(**asked, stream=True, extra_body={"reasoning": "nothing"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reasoning": "fast"}, "fast"),
        ({"reasoning": {"probe": {"chunks": 3}}}, "chunks"),
        ({"reasoning": {"same": "text"}}, "reasoning.same"),
        ({"votes": {"fixed": None, "tokens": 2}, "temperature": 1}, "votes.tokens=2"),
        ({"reasoning": {"tags": ["<a>", "</a>"]}}, "reasoning.tags"),
        ({"reasoning": {"budget": 5}, "thinking_token_budget": 4}, "thinking_token_budget"),
        ({"votes": 4}, "temperature=0"),
        ({"votes": 65, "temperature": 1}, "64 at most"),
        ({"votes": "many", "temperature": 1}, "many"),
        ({"votes": {"adaptive": {"mst": 3}}, "temperature": 1}, "mst"),
        ({"votes": 2, "temperature": 1, "n": 2}, "n=2 with votes"),
        ({"reasoning": "probe", "stop": ["x"]}, "stop with reasoning"),
        ({"reasoning": "probe", "deadline_ms": 9e9}, "deadline_ms with reasoning"),
        ({"reasoning": "probe", "logprobs": True}, "logprobs with reasoning"),
        ({"reasoning": "probe", "service_tier": "flex"}, "service_tier"),
        ({"reasoning": "probe", "priority": 1}, "priority with reasoning"),
        ({"reasoning": "probe", "response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning": "probe", "fidelity": "certified"}, "certified"),
        ({"reasoning": 3}, "reasoning"),
    ],
)
def test_what_cannot_be_obeyed_is_a_400_that_names_it(address, given, said) -> None:
    answer = chat(address, **given)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_client_that_goes_away_ends_its_chains(address, server, monkeypatch) -> None:
    chains, vote = server.versions.live.chains, Reasoner.vote
    begun, ended = threading.Event(), []

    def watched(*args, **given):
        begun.set()
        assert wait_until(lambda: not chains._waiting)
        try:
            return vote(*args, **given)
        except GivenUp as error:
            ended.append(error)
            raise

    monkeypatch.setattr(Reasoner, "vote", watched)
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    body |= {"votes": 60, "temperature": 1.0, "max_tokens": 1000, "seed": 1}
    client = sent(address, "/v1/chat/completions", body)
    assert begun.wait(PATIENCE)
    client.close()
    assert wait_until(lambda: ended)
    made(chat(address, reasoning="none"))  # the next one has its turn


@pytest.mark.parametrize(
    "given",
    [
        {"reasoning": {"probe": {"chunk": 8}}, "n": 2, "temperature": 0.9, "seed": 4},
        {"reasoning": {"rollback": None, "budget": 90}, "temperature": 1.5, "seed": 2},
        {"reasoning": {"variance": FORKS, "budget": 30}, "temperature": 0},
        {"votes": 3, "temperature": 0.9, "seed": 1},
    ],
)
def test_what_is_streamed_of_each_choice_is_its_whole_text(address, given) -> None:
    whole = made(chat(address, **given))
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION.format(3)}]}
    body |= {"max_tokens": 400, "stream": True} | given
    texts = [["", ""] for _ in whole["choices"]]
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    for line in answer.text.splitlines():
        for one in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            for place, name in enumerate(("reasoning", "content")):
                texts[one["index"]][place] += one["delta"].get(name) or ""
    messages = [one["message"] for one in whole["choices"]]
    assert texts == [[one["reasoning"], one["content"]] for one in messages]


def test_the_variance_trigger_forks_and_re_weighs_and_what_it_made_is_counted(address) -> None:
    found = {}
    for action in ("fork", "reweigh"):
        asked = {"variance": FORKS | {"action": action}, "budget": 30}
        body = made(chat(address, reasoning=asked, temperature=0, max_tokens=60))
        (chain,) = body["deliberate"]["chains"]
        found[action] = chain["forks"], chain["reweighed"], chain["rolled_back"]
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 30
        spent = body["usage"]["completion_tokens"]
        assert spent > chain["rolled_back"] and spent <= 60 + chain["rolled_back"]
    forks, reweighed, lost = found["fork"]
    assert forks and lost and not reweighed
    forks, reweighed, lost = found["reweigh"]
    assert reweighed and not forks and not lost
    refused = chat(address, reasoning={"variance": {"size": 2}})
    assert refused.status_code == 400 and "no setting 'size'" in refused.text


def test_requests_with_chains_run_beside_each_other_and_answer_as_they_do_alone(
    address, monkeypatch
) -> None:
    asked = [
        {"number": number, "reasoning": {"probe": {"chunk": 16}}, "temperature": heat, "seed": 7}
        for number, heat in ((3, 0), (5, 0.9), (8, 0))
    ]
    alone = [made(chat(address, **one))["choices"] for one in asked]
    begun, answered, run = threading.Event(), threading.Event(), Reasoner.vote

    def late(*args, **given):
        begun.set()
        found = run(*args, **given)
        assert answered.wait(PATIENCE)
        return found

    monkeypatch.setattr(Reasoner, "vote", late)
    with ThreadPoolExecutor(4) as pool:
        vote = pool.submit(chat, address, temperature=1.0, seed=1, votes=24, max_tokens=300)
        assert begun.wait(PATIENCE)
        together = [pool.submit(chat, address, **one) for one in asked]
        assert [made(one.result())["choices"] for one in together] == alone
        answered.set()  # nobody has waited for it
        assert made(vote.result())["deliberate"]["votes"]["chains"] == 24


def test_the_document_has_the_fields(address) -> None:
    document = httpx.get(f"{address}/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"reasoning", "votes"} <= set(fields)
    assert json.dumps(fields["votes"])
