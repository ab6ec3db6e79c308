"""Rules that a request is checked against before it is read any further: text, sizes, duplicates.

The rules are a YAML file that is read again when it changes, so that an operator can shut out what
does harm without a restart. A check keeps nothing between requests, but for how often equal
requests are in flight.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import regex
import yaml

from deliberate.serving.errors import ApiError
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)
Body = ChatRequest | CompletionRequest
_LIMITS = ("max_characters", "max_messages", "max_prompt_tokens", "max_tokens", "max_equal")


@dataclass(frozen=True)
class Forbidden:
    """A pattern that no text of a request may contain.

    Attributes:
        name: what a refused client is told; the pattern is not shown.
        pattern: a regular expression.
    """

    name: str
    pattern: regex.Pattern[str]


@dataclass(frozen=True)
class Rules:
    """What a request must keep to; None is no limit.

    Attributes:
        max_characters: of all texts of a request together.
        max_messages: of a chat.
        max_prompt_tokens: of the prompt.
        max_tokens: that a request may ask for.
        max_equal: equal requests that may be in flight together.
        control_characters: whether the texts may contain other control characters than tab and
            the line ends.
        forbidden: patterns.
        pattern_seconds: longest time that one pattern may take; a text that takes longer is
            refused, since an expression can take time exponential in it.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    max_characters: int | None = None
    max_messages: int | None = None
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_equal: int | None = None
    control_characters: bool = True
    forbidden: tuple[Forbidden, ...] = ()
    pattern_seconds: float = 0.05

    def __post_init__(self) -> None:
        for name in _LIMITS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise DeliberateError(f"{name}: {value!r} must be a whole number from 1")
        if type(self.control_characters) is not bool:
            raise DeliberateError(
                f"control_characters: {self.control_characters!r} must be true or false"
            )
        seconds = self.pattern_seconds
        if not isinstance(seconds, int | float) or not 0 < seconds < 60:
            raise DeliberateError(f"pattern_seconds: {seconds!r} must be between 0 and 60")

    @classmethod
    def read(cls, path: Path) -> Rules:
        """The rules of a YAML file.

        Raises:
            DeliberateError: the file, the entry at fault and what is allowed.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise DeliberateError(f"rules {path} cannot be read: {text}") from None
        if not isinstance(raw, dict):
            raise DeliberateError(f"rules {path}: names with values are needed, one a line")
        names = [one.name for one in fields(cls)]
        for name in raw:
            if name not in names:
                raise DeliberateError(f"rules {path}: {name!r} is not one of {', '.join(names)}")
        try:
            forbidden = tuple(_forbidden(one) for one in raw.pop("forbidden", None) or ())
            return cls(forbidden=forbidden, **raw)
        except DeliberateError as error:
            raise DeliberateError(f"rules {path}: {error}") from None


def _forbidden(raw: Any) -> Forbidden:
    if not isinstance(raw, dict) or set(raw) != {"name", "pattern"}:
        raise DeliberateError(f"forbidden: {raw!r:.60} must have a name and a pattern")
    try:
        return Forbidden(str(raw["name"]), regex.compile(str(raw["pattern"])))
    except regex.error as error:
        raise DeliberateError(f"forbidden {raw['name']!r}: not a pattern: {error}") from None


class RuleFile:
    """The rules of a file, read again when it has changed.

    A file that has become unreadable or wrong leaves the last good rules in force, and is named
    in the log.

    Args:
        path: of the file.

    Raises:
        DeliberateError: it is wrong at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._rules = Rules.read(path)

    def rules(self) -> Rules:
        """As the file has them now."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._rules = Rules.read(self._path)
                logger.info("rules %s were read again", self._path)
            except DeliberateError as error:
                logger.error("the rules stay as they were: %s", error)
        return self._rules

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)


class Precheck:
    """Checks requests against the rules.

    Args:
        rules: called for the rules of the moment.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        rules: Callable[[], Rules] = Rules,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._in_flight: Counter[bytes] = Counter()

    @classmethod
    def of(cls, path: Path | None) -> Precheck:
        """Of a rules file; without one nothing is limited here.

        Raises:
            DeliberateError: the file is wrong.
        """
        return cls() if path is None else cls(RuleFile(path).rules)

    def enter(self, body: Body) -> Passed:
        """Checks a request that has arrived; what is returned must be closed at its end.

        Raises:
            ApiError: a rule that it breaks: 400, or 429 where equal ones are in flight.
        """
        began = self._clock()
        rules = self._rules()
        self._check(rules, body)
        key = None
        if rules.max_equal is not None:
            key = hashlib.blake2b(body.model_dump_json().encode(), digest_size=16).digest()
            if self._in_flight[key] >= rules.max_equal:
                raise ApiError(
                    429,
                    f"{rules.max_equal} equal requests are in flight already: wait for one of them",
                    "overloaded_error",
                    retry_after=1,
                )
            self._in_flight[key] += 1
        return Passed(self, rules, key, self._clock() - began)

    def _check(self, rules: Rules, body: Body) -> None:
        texts = _texts(body)
        count = sum(map(len, texts))
        if rules.max_characters is not None and count > rules.max_characters:
            raise ApiError(
                400, f"the texts have {count} characters: {rules.max_characters} at most here"
            )
        if isinstance(body, ChatRequest):
            given = len(body.messages)
            if rules.max_messages is not None and given > rules.max_messages:
                raise ApiError(400, f"messages: {given} of them: {rules.max_messages} at most here")
        wanted = body.limit
        if rules.max_tokens is not None and wanted is not None and wanted > rules.max_tokens:
            raise ApiError(
                400, f"max_tokens={wanted}: this server makes {rules.max_tokens} at most"
            )
        for text in texts:
            if not rules.control_characters and (found := _CONTROL.search(text)):
                raise ApiError(
                    400,
                    f"the control character U+{ord(found[0]):04X} at {found.start()} is not "
                    "allowed here: remove it",
                )
            for one in rules.forbidden:
                try:
                    found = one.pattern.search(text, timeout=rules.pattern_seconds)
                except TimeoutError:
                    raise ApiError(
                        400, f"the rule {one.name!r} takes too long on this text: shorten it"
                    ) from None
                if found:
                    raise ApiError(400, f"the rule {one.name!r} forbids this text")

    def release(self, key: bytes | None) -> None:
        """A request that was entered under `key` has ended."""
        if key is None:
            return
        self._in_flight[key] -= 1
        if self._in_flight[key] <= 0:
            del self._in_flight[key]


_CONTROL = regex.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Passed:
    """A request that has passed; closing it twice is as closing it once.

    Attributes:
        rules: that it has passed.
        seconds: that this took.
    """

    def __init__(self, checks: Precheck, rules: Rules, key: bytes | None, seconds: float) -> None:
        self.rules = rules
        self.seconds = seconds
        self._checks = checks
        self._key = key

    def check_length(self, tokens: int) -> None:
        """Its prompt has so many tokens.

        Raises:
            ApiError: more than the rules allow.
        """
        most = self.rules.max_prompt_tokens
        if most is not None and tokens > most:
            raise ApiError(400, f"a prompt of {tokens} tokens: {most} at most here")

    def close(self) -> None:
        """It has ended."""
        key, self._key = self._key, None
        self._checks.release(key)


def _texts(body: Body) -> list[str]:
    if isinstance(body, ChatRequest):
        texts = [message.text for message in body.messages]
        calls = [call for message in body.messages for call in message.tool_calls or ()]
        texts += [call.function.arguments for call in calls]
        return texts + [one.model_dump_json() for one in body.callable_tools]
    return [body.prompt] if isinstance(body.prompt, str) else []
