"""Tools over HTTP: calls are valid against their schema, streamed as whole, and refused by name."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import running

from deliberate.api import checkpoint
from deliberate.serving.command import build_server
from deliberate.serving.protocol import ChatRequest
from deliberate.serving.settings import ServerSettings
from deliberate.serving.tool_calls import ToolReader
from deliberate.serving.tools import ToolFormat

HERMES = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n{% endfor %}assistant:"
)
BARE = (
    HERMES.replace("<tool_call>\n", "")
    .replace("\n</tool_call>", "")
    .replace('"arguments"', '"parameters"')
)
BLIND = "{% for m in messages %}{{ m.content }}{% endfor %}"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome }\n</tool_call>"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]
CHAT = [{"role": "user", "content": "What is 2 plus 2?"}]


def serving(model, template):
    tokenizer = checkpoint.load_tokenizer("tiny")
    tokenizer.chat_template = template
    return running(build_server(model, tokenizer, "tiny", ServerSettings()))


@pytest.fixture(scope="module", params=[HERMES, BARE], ids=["tagged", "bare"])
def tagged_and_bare(model, request):
    with serving(model, request.param) as url:
        yield url, request.param is HERMES


@pytest.fixture(scope="module")
def address(tagged_and_bare):
    return tagged_and_bare[0]


def ask(address, **given):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    given = {"messages": CHAT, "tools": TOOLS, "max_tokens": 120, "temperature": 1.5} | given
    return client.chat.completions.create(model="tiny", **given)


def check(calls) -> None:
    for call in calls:
        made = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert set(made) == {"city", "days"}
            assert all(made[key] in SCHEMA["properties"][key]["enum"] for key in made)
        else:
            assert call.function.name == "now" and made == {}
        assert call.id.startswith("call_") and call.type == "function"


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_required_call_is_one_of_the_tools_with_valid_arguments(address, fidelity) -> None:
    for seed in range(4):
        answer = ask(address, seed=seed, tool_choice="required", parallel_tool_calls=False,
                     extra_body={"fidelity": fidelity}).choices[0]  # fmt: skip
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        check([call])


def test_a_named_tool_is_the_one_that_is_called(address) -> None:
    for name in ("weather", "now"):
        choice = {"type": "function", "function": {"name": name}}
        (call,) = ask(address, seed=1, tool_choice=choice).choices[0].message.tool_calls
        assert call.function.name == name
        check([call])


def test_a_stream_adds_up_to_the_calls_of_the_whole_answer(address) -> None:
    given = {"seed": 3, "n": 3, "tool_choice": "required"}
    whole = ask(address, **given)
    events = list(ask(address, stream=True, **given))
    for index in range(3):
        mine = [c for e in events for c in e.choices if c.index == index]
        names, texts = {}, {}
        for piece in [one for c in mine for one in c.delta.tool_calls or ()]:
            if piece.function.name is not None:
                assert piece.id and piece.index not in names
                names[piece.index] = piece.function.name
            texts[piece.index] = texts.get(piece.index, "") + piece.function.arguments
        made = whole.choices[index]
        assert [(names[at], texts[at]) for at in sorted(names)] == [
            (call.function.name, call.function.arguments) for call in made.message.tool_calls
        ]
        assert [c.finish_reason for c in mine if c.finish_reason] == [made.finish_reason]
        assert not any(c.delta.content for c in mine)


def test_a_model_that_may_call_may_also_answer_in_text(address) -> None:
    plain = ask(address, tools=None, temperature=0)
    for choice in ("none", "auto"):
        answer = ask(address, tool_choice=choice, temperature=0)
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason in ("stop", "length")
        shown = answer.usage.prompt_tokens - plain.usage.prompt_tokens
        assert (shown > 0) == (choice == "auto")  # the model sees what it may call
    with_logprobs = ask(address, tool_choice="required", seed=1, logprobs=True)
    assert len(with_logprobs.choices[0].logprobs.content) == with_logprobs.usage.completion_tokens


def test_earlier_calls_and_results_are_rendered(tagged_and_bare) -> None:
    address, tagged = tagged_and_bare
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [*CHAT, {"role": "assistant", "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_1", "content": "noon"}]  # fmt: skip
    tokenizer = checkpoint.load_tokenizer("tiny")
    written = 'now", "arguments": {}}' if tagged else 'now", "parameters": {}}'
    longer = ask(address, messages=turns, max_tokens=1).usage.prompt_tokens
    shorter = ask(address, max_tokens=1).usage.prompt_tokens
    assert longer - shorter > len(tokenizer.encode(written))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": None, "tool_choice": "auto"}, "tool_choice without tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "not in tools"),
        ({"response_format": {"type": "json_object"}}, "response_format and tools"),
        ({"stop": "a"}, "stop and tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]},
         "structured grammar"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "tool_call_id"),
        ({"messages": [{"role": "user"}]}, "content"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_name(address, body, message) -> None:
    given = {"model": "tiny", "messages": CHAT, "tools": TOOLS} | body
    answer = httpx.post(f"{address}/v1/chat/completions", json=given)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_template_that_shows_no_tools_refuses_them(model) -> None:
    with serving(model, BLIND) as url, pytest.raises(openai.BadRequestError, match="does not show"):
        ask(url)


def test_a_model_that_writes_one_call_refuses_parallel_ones(tagged_and_bare) -> None:
    address, tagged = tagged_and_bare
    if tagged:
        answer = ask(address, tool_choice="required", parallel_tool_calls=True, seed=1).choices[0]
        assert answer.finish_reason == "length"  # the last of its calls is cut
        check(answer.message.tool_calls[:-1])
        assert len(answer.message.tool_calls) > 1
    else:
        with pytest.raises(openai.BadRequestError, match="writes one call"):
            ask(address, parallel_tool_calls=True)


PIECES = st.sampled_from(["a < b", "<tool_", "\n", "{", "}", "call", "\N{SNOWMAN}"])
ARGUMENTS = st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers(), max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.lists(PIECES, max_size=4), st.lists(ARGUMENTS, max_size=3), st.booleans(), st.data())
def test_a_reader_gets_the_same_from_any_pieces_of_a_text(before, made, tagged, data) -> None:
    form = ToolFormat(tagged=tagged)
    calls = [form.head("f_1") + json.dumps(one) + "}" for one in made]
    content = "".join(before)
    if tagged:
        text = content + "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in calls)
    else:
        calls, made = calls[:1], made[:1]
        content = "" if calls else "x" + content
        text = "".join(calls) or content
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, seen, arguments = ToolReader(form), "", {}
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for got, pieces in [*map(reader.push, parts), reader.finish()]:
        seen += got
        for one in pieces:
            at = one["index"]
            arguments[at] = arguments.get(at, "") + one["function"]["arguments"]
    assert seen == content
    assert [json.loads(one["function"]["arguments"]) for one in reader.calls] == made
    assert [arguments[at] for at in sorted(arguments)] == [
        one["function"]["arguments"] for one in reader.calls
    ]


@pytest.mark.parametrize("tagged", [True, False])
def test_a_call_that_is_cut_keeps_what_was_made_of_its_arguments(tagged) -> None:
    form = ToolFormat(tagged=tagged)
    whole = ("<tool_call>\n" if tagged else "") + form.head("f") + '{"a": {"b": 1}}'
    for length in range(len(whole), len(whole) - 5, -1):
        reader = ToolReader(form)
        reader.push(whole[:length])
        reader.finish()
        assert whole[:length].endswith(reader.calls[0]["function"]["arguments"])
        assert reader.calls[0]["function"]["arguments"].startswith('{"a"')
        assert len(reader.calls[0]["function"]["arguments"]) == 15 - (len(whole) - length)


@pytest.mark.parametrize("value", ["9" * 40, "[" * 3000 + "]" * 3000, '"}\\"{"', '{"b": {}}'])
def test_arguments_end_where_their_brackets_say_whatever_they_hold(value) -> None:
    form = ToolFormat(tagged=False)
    reader = ToolReader(form)
    arguments = f'{{"a": {value}}}'
    reader.push(form.head("f") + arguments + "}")
    reader.finish()
    assert reader.calls[0]["function"]["arguments"] == arguments


def test_a_call_within_the_reasoning_is_a_call_whatever_the_budget_is(model) -> None:
    """A model that calls before it closes its tag: no closing tag is forced within the call."""
    tokenizer = checkpoint.load_tokenizer("tiny")
    tokenizer.chat_template = HERMES + "<think>"
    settings = ServerSettings(reasoning_tags=("<think>", "</think>"))
    builder = build_server(model, tokenizer, "tiny", settings).builder
    body = ChatRequest(
        model="tiny", messages=CHAT, tools=TOOLS, max_tokens=120, thinking_token_budget=12
    )
    (request,) = builder.build(body, 0.0)
    call = (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    )
    tokens = tokenizer.encode("I see." + call, add_special_tokens=False)
    text = builder.reasoning.text(request.prompt_ids, (), chat=True, calls=True)
    said = {True: "", False: ""}
    for token in tokens:
        following = request.constraint.forced()
        assert not following or following[0] == token
        request.constraint.advance(token)
        piece = text.push(token)
        said[text.is_reasoning] += piece
    said[False] += text.finish()
    assert said == {True: "I see.", False: call}
    reader = ToolReader(builder.tool_format)
    assert reader.push(said[False])[0] + reader.finish()[0] == ""
    assert json.loads(reader.calls[0]["function"]["arguments"]) == {"city": "Oslo", "days": 2}
