"""Calls of tools read from an answer's text as it comes."""

from __future__ import annotations

import re
import secrets
from typing import Any

from deliberate.serving.text import overlap
from deliberate.serving.tools import END_MARKER, MARKER, ToolFormat
from deliberate.utils.json_files import parse_json

_NAME = re.compile(r'\s*\{"name": ("[^"]*"), "(?:arguments|parameters)": ')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class ToolReader:
    """Text, and calls in OpenAI's form for streams.

    The text is decoded under `ToolFormat.grammar`, so that it need not be checked again.

    Args:
        form: of the calls.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._tagged = form.tagged
        self._state = "text" if form.tagged else "start"
        self._held = ""
        self._arguments = ""
        self._end = f"}}\n{END_MARKER}" if form.tagged else "}"
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What more text says: content for the client, and pieces of calls."""
        self._held += text
        content, pieces = "", list[dict[str, Any]]()
        while True:
            before = self._state
            if before == "start" and (first := self._held.lstrip()):
                self._state = "head" if first.startswith("{") else "plain"
            elif before == "plain":
                content, self._held = content + self._held, ""
            elif before in ("text", "between"):
                found, self._held = self._until(MARKER, "head")
                content += found if before == "text" else ""
            elif before == "head" and (head := _NAME.match(self._held)):
                self._held, self._state = self._held[head.end() :], "arguments"
                pieces.append(self._begin(parse_json(head[1], "a tool's name")))
            elif before == "arguments":
                found = self._until_end()
                if found:
                    pieces.append(self._more(found))
            if self._state == before:
                return content, pieces

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        if self._state in ("text", "start"):
            return held, []
        # What is held may be the end of the arguments, where the answer was cut.
        if self._state == "arguments" and held == "}" and not _is_whole(self._arguments):
            return "", [self._more(held)]
        return "", []

    def _until(self, mark: str, state: str) -> tuple[str, str]:
        """Text before a mark, and what is held after it."""
        place = self._held.find(mark)
        if place >= 0:
            self._state = state
            return self._held[:place], self._held[place + len(mark) :]
        cut = len(self._held) - overlap(self._held, mark)
        return self._held[:cut], self._held[cut:]

    def _until_end(self) -> str:
        if self._tagged:
            found, self._held = self._until(self._end, "between")
            return found
        cut = len(self._held) - self._held.endswith("}")
        found, self._held = self._held[:cut], self._held[cut:]
        return found

    def _begin(self, name: str) -> dict[str, Any]:
        self._arguments = ""
        function = {"name": name, "arguments": ""}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        self.calls.append(call)
        return {"index": len(self.calls) - 1} | call | {"function": dict(function)}

    def _more(self, text: str) -> dict[str, Any]:
        self._arguments += text
        self.calls[-1]["function"]["arguments"] = self._arguments
        return {"index": len(self.calls) - 1, "function": {"arguments": text}}


def _is_whole(text: str) -> bool:
    """Whether an object that was begun has ended; its grammar was obeyed, so brackets tell."""
    bare = _STRING.sub("", text)
    return '"' not in bare and 0 < bare.count("{") == bare.count("}")
