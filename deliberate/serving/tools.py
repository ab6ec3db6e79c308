"""Functions that a client offers the model, and what a call of them looks like in its text.

A call is decoded under a grammar, so that its name is one of the offered ones and its arguments are
JSON that is valid against that function's schema. The form is the one in which the model's own chat
template writes calls: between ``<tool_call>`` tags (Hermes, Qwen), or as bare JSON (Llama 3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from deliberate.serving.fields import Strict, Text

MARKER, END_MARKER = "<tool_call>", "</tool_call>"
# Of the arguments' JSON, unless a schema says otherwise: one line, as templates write it.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that may be called.

    Attributes:
        parameters: JSON schema of its arguments, an object; none for no arguments.
        strict: taken and of no effect, since every call is valid against its schema.
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that is offered: a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Which function."""

    name: Name


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    """A function and its arguments as JSON text."""

    name: Text
    arguments: str


class ToolCall(Strict):
    """A call in an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written in the model's text.

    Attributes:
        tagged: each between ``<tool_call>`` tags, with text before the first and any number of
            them; otherwise the whole answer is one call.
        key: what the arguments are called: ``arguments`` or ``parameters``.
    """

    tagged: bool = True
    key: str = "arguments"

    @classmethod
    def of(cls, render: Callable[..., str]) -> ToolFormat | None:
        """Of a chat template; None where the model does not get to see the tools by it.

        Args:
            render: the template: called with messages, and with ``tools=``.
        """
        ask = {"role": "user", "content": "a"}
        function = {"name": "probe_name", "arguments": {"probe_key": 1}}
        called = {"role": "assistant", "content": "", "tool_calls": [
            {"id": "a", "type": "function", "function": function}
        ]}  # fmt: skip
        schema = {"type": "object", "properties": {"probe_key": {"type": "integer"}}}
        offered = {"name": "probe_name", "description": "a", "parameters": schema}
        tools = [{"type": "function", "function": offered}]
        try:
            shown = render([ask], tools=tools)
            if "probe_name" not in shown:
                return None
        except Exception:  # of the model's own template, in whatever way it fails
            return None
        try:
            written = render([ask, called], tools=tools)
        except Exception:
            written = shown
        parameters = re.search(r'"parameters":\s*\{"probe_key"', written[len(shown) - 1 :])
        return cls(MARKER in written, "parameters" if parameters else "arguments")

    def head(self, name: str) -> str:
        """What is written before a function's arguments."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": '

    def grammar(self, tools: Sequence[Function], *, required: bool, parallel: bool) -> str:
        """A Lark grammar (llguidance's) of answers.

        Args:
            tools: that may be called.
            required: one must be; otherwise the answer may be text.
            parallel: more than one may be.
        """
        lines = []
        for at, one in enumerate(tools):
            schema = one.parameters
            if schema is None:
                schema = {"type": "object", "properties": {}, "additionalProperties": False}
            schema = {"x-guidance": _STYLE} | schema
            lines.append(f'call{at}: {json.dumps(self.head(one.name))} arguments{at} "}}"')
            lines.append(f"arguments{at}: %json {json.dumps(schema)}")
        calls = " | ".join(f"call{at}" for at in range(len(tools)))
        lines.append(f"call: {calls}")
        if not self.tagged:
            start = "call" if required else "PLAIN? | call"
            lines.append(r"PLAIN: /\s*[^{\s](?s:.*)/")
        else:
            more = rf' ("\n{MARKER}" body)*' if parallel else ""
            start = f"first{more}" if required else f"PLAIN? | first{more}"
            lines += ["first: head body", rf'body: "\n" call "\n{END_MARKER}"']
            lines.append(f'head: "{MARKER}"' if required else f'head[lazy]: /(?s:.*)/ "{MARKER}"')
            lines.append(rf"PLAIN: /(?s:.+)/ & ~/(?s:.*{MARKER}.*)/")
        return "\n".join([f"start: {start}", *lines])
