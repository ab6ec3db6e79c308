"""Chains of other systems: what their evaluations wrote, as chains that rules can be replayed on.

Public repositories hold outputs of reasoning models as JSON lines: a problem, the whole output, the
answer that was read from it, the reference. The reasoning is what stands between the tags. What the
model would have answered half-way nobody knows; a replay can use the answer that the text has
stated up to there (`stated_probes`): it costs no token and has no confidence, so rules that need
the model's probabilities never stop on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from deliberate.reasoning.chain_recorder import Encode, RecordProbes
from deliberate.reasoning.recorded_chains import (
    ProbePlaces,
    RecordedChain,
    RecordedProbe,
)
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json, read_text

TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
"""Tags of public models, opening and closing: DeepSeek-R1, QwQ and Qwen3; Sky-T1."""
# So many characters before a place are read again at the next one: what was stated across it.
_OVERLAP = 200
# Tokens of a switch word or of the end of a step at most.
_LONGEST_WORD = 16
# More tokens than a chain has.
_NEVER = 1 << 30

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class OutputFields:
    """Keys of a line that hold what a chain is made of.

    Attributes:
        id: of the problem; a line without it has its number.
        question: of the problem; needed where a model is asked.
        output: the text that the model wrote, tags included.
        answer: that was read from it; where there is none, it is read from the text.
        expected: the reference answer.
    """

    id: str = "id"
    question: str = "question"
    output: str = "output"
    answer: str = "answer"
    expected: str = "expected"

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name):
                raise DeliberateError(f"fields.{one.name} is empty: name a key of the lines")


@dataclass(frozen=True)
class Output:
    """One line.

    Attributes:
        id, question, expected: of the problem; expected None: not known.
        reasoning: between the tags; all of the text where it never closes them.
        after: what follows the closing tag; None: the chain was cut off before it.
        answer: of the whole output; empty: none, as of a chain that was cut off.
    """

    id: str
    question: str
    expected: str | None
    reasoning: str
    after: str | None
    answer: str


def split_output(text: str) -> tuple[str, str | None]:
    """Reasoning and what follows it; None: the closing tag never came.

    Chat templates often write the opening tag into the prompt, so it may be missing.
    """
    for opening, closing in TAGS:
        head, found, tail = text.partition(closing)
        if found or opening in text:
            before, opened, rest = head.partition(opening)
            return (rest if opened else before), (tail if found else None)
    return text, None


def read_outputs(
    path: str | Path, keys: OutputFields, answer_of: Callable[[str], str]
) -> list[Output]:
    """The lines of a file.

    Args:
        path: JSON lines.
        keys: where a line holds what; a value may be a list of one.
        answer_of: the final answer in a text, where a line has none.

    Raises:
        DeliberateError: a file that is none, or a line without an output.
    """
    found: list[Output] = []
    for number, line in enumerate(read_text(path).splitlines()):
        if not line.strip():
            continue
        source = f"{path}, line {number + 1}"
        record = parse_json(line, source, finite=False)
        if not isinstance(record, dict):
            raise DeliberateError(f"{source}: not an object of fields")
        text = _text(record.get(keys.output))
        if text is None:
            known = ", ".join(sorted(record))
            raise DeliberateError(
                f"{source}: no text in fields.output={keys.output}; the line has {known:.200}"
            )
        reasoning, after = split_output(text)
        answer = ""
        if after is not None:
            answer = _text(record.get(keys.answer)) or answer_of(after)
        name = _text(record.get(keys.id))
        found.append(
            Output(
                str(number) if name is None else name,
                _text(record.get(keys.question)) or "",
                _text(record.get(keys.expected)),
                reasoning,
                after,
                answer,
            )
        )
    if not found:
        raise DeliberateError(f"{path}: no outputs")
    return found


def _text(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value)


def recorded_output(
    output: Output, encode: Encode, probes: Sequence[RecordedProbe] = ()
) -> RecordedChain:
    """The chain of an output, with these probes."""
    return RecordedChain(
        output.id,
        output.answer,
        output.expected,
        tuple(encode(output.reasoning)),
        answer_tokens=len(encode(output.after or "")),
        finished=output.after is not None,
        probes=tuple(probes),
    )


def stated_probes(
    tokens: Sequence[int],
    places: ProbePlaces,
    encode: Encode,
    decode: Decode,
    stated: Callable[[str], str | None],
) -> list[RecordedProbe]:
    """At every place the answer that the text has stated last; free, and without a confidence.

    Args:
        tokens: of the reasoning.
        places: where a rule may look.
        encode, decode: ids of a text and back.
        stated: the answer that a piece of text states; None: none.
    """
    at_a_word = RecordProbes(replace(places, chunk=_NEVER), encode).due
    found: list[RecordedProbe] = []
    newest, text, begun = "", "", 0
    for at in range(1, len(tokens) + 1):
        # Of the newest tokens only: a chain may have 40,000.
        if at % places.chunk and not at_a_word(tokens[max(0, at - _LONGEST_WORD) : at]):
            continue
        text = text[-_OVERLAP:] + decode(tokens[begun:at])
        begun = at
        newest = stated(text) or newest
        found.append(RecordedProbe(at, newest))
    return found
