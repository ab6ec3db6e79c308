"""Structured output: JSON schema, regular expression, choice or grammar as a constraint.

llguidance (MIT, Rust) parses grammars and computes masks; it is optional. Its tokens that follow
from the grammar are emitted without running the model to choose them ("fast-forward tokens"). JSON
is written on one line, with one space after a comma and a colon, unless the schema's ``x-guidance``
says otherwise: free whitespace lets a model write blanks until its limit.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deliberate.installation import install_extra
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

_EXAMPLE = 'e.g. structured={"choice": ["yes", "no"]}'
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Masks that are kept for verification; more than drafts of one pass.
_KEPT_MASKS = 64
_TOKENIZERS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


class Structure(StrEnum):
    """What describes the output."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class StructuredOutput:
    """What the output must look like.

    Attributes:
        structure: the kind of description.
        text: a JSON schema or a list of choices as JSON, a regular expression (syntax of Rust's
            regex), or a grammar (EBNF of llama.cpp, with ``root ::=``, or Lark, with ``start:``).

    Raises:
        DeliberateError: an unknown kind, or a text that is none.
    """

    structure: Structure
    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise DeliberateError(
                f"structured {self.structure}={self.text!r}: it must be a text that is not empty"
            )

    @classmethod
    def of(cls, given: Any) -> StructuredOutput:
        """From ``{"json_schema": ...}``, ``{"regex": ...}``, ``{"choice": [...]}`` or
        ``{"grammar": ...}``; a schema is a dict, JSON text, or a pydantic model.

        Raises:
            DeliberateError: the description is none of these.
        """
        if isinstance(given, StructuredOutput):
            return given
        kinds = ", ".join(Structure)
        if not isinstance(given, Mapping) or len(given) != 1:
            raise DeliberateError(
                f"structured={_short(given)}: give a dict with one of {kinds}, {_EXAMPLE}"
            )
        ((name, value),) = given.items()
        if name not in set(Structure):
            raise DeliberateError(f"structured={_short(given)}: {name!r} is not one of {kinds}")
        structure = Structure(name)
        if structure is Structure.JSON_SCHEMA:
            return cls(structure, _schema_text(value))
        if structure is Structure.CHOICE:
            return cls(structure, _choices_text(value))
        return cls(structure, value)

    def constraint(
        self, tokenizer: Any, end_tokens: Sequence[int], vocabulary: int
    ) -> GrammarConstraint:
        """The constraint at the beginning of an output; each sequence needs its own.

        Args:
            tokenizer: transformers' fast tokenizer of the model.
            end_tokens: ids that end the output, at least one.
            vocabulary: width of the model's logits.

        Raises:
            DeliberateError: llguidance is not installed, the tokenizer cannot be used, or the
                description has an error.
        """
        library = _llguidance()
        if not end_tokens:
            raise DeliberateError(
                "structured output needs a token that ends it: set eos_token_id, e.g. "
                "eos_token_id=tokenizer.eos_token_id"
            )
        known = _tokenizer(library, tokenizer, tuple(end_tokens), vocabulary)
        matcher_class = library.LLMatcher
        try:
            grammar = self._grammar(library)
        except (ValueError, TypeError) as error:
            raise self._error(str(error)) from error
        wrong, messages = matcher_class.validate_grammar_with_warnings(grammar, known)
        if wrong or messages:
            raise self._error(messages[0])
        matcher = matcher_class(known, grammar, log_level=0)
        if matcher.is_error():
            raise self._error(matcher.get_error())
        return GrammarConstraint(matcher, end_tokens, vocabulary)

    def _grammar(self, library: Any) -> str:
        matcher = library.LLMatcher
        if self.structure is Structure.JSON_SCHEMA:
            return matcher.grammar_from_json_schema(self.text, defaults=_JSON_STYLE)
        if self.structure is Structure.REGEX:
            return matcher.grammar_from_regex(self.text)
        if self.structure is Structure.CHOICE:
            texts = [json.dumps(one, ensure_ascii=False) for one in parse_json(self.text, "choice")]
            return matcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        return library.grammar_from("ebnf", self.text)

    def _error(self, message: str) -> DeliberateError:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        first = lines[0] if lines else "an error"
        causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if first.endswith(":") and causes:  # what is wrong follows, after a drawing of where it is
            first = f"{first} {causes[0]}"
        return DeliberateError(f"structured {self.structure}: {first}")


class GrammarConstraint:
    """A `LogitConstraint` by llguidance's parser.

    Args:
        matcher: ``llguidance.LLMatcher`` at its start; owned by this object.
        end_tokens: ids that end the output, allowed where the grammar is satisfied.
        vocabulary: width of the logits.
    """

    def __init__(self, matcher: Any, end_tokens: Sequence[int], vocabulary: int) -> None:
        self._matcher = matcher
        self._ends = tuple(end_tokens)
        self._vocabulary = vocabulary
        self._bits = np.zeros((vocabulary + 31) // 32, dtype=np.int32)
        self._tokens: list[int] = []
        self._ended = False
        # Where a rollback removed tokens and the same follow again, masks are not computed again.
        self._forbidden: dict[int, Tensor] = {}
        self._removed: list[int] = []

    def copy(self) -> GrammarConstraint:
        """Another constraint in the same state, for another sequence."""
        other = GrammarConstraint(self._matcher.deep_copy(), self._ends, self._vocabulary)
        other._tokens, other._ended = list(self._tokens), self._ended
        return other

    @property
    def tokens(self) -> list[int]:
        """Tokens that the parser has accepted, an end token included (a copy)."""
        return list(self._tokens)

    @property
    def satisfied(self) -> bool:
        """Whether the tokens so far are a complete output."""
        return self._ended or bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """Whether an end token has been accepted."""
        return self._ended

    def mask(self, scores: Tensor) -> Tensor:
        """Scores ``[V]`` with minus infinity for tokens that may not come next."""
        place = len(self._tokens)
        forbidden = self._forbidden.get(place)
        if forbidden is None:
            forbidden = self._compute()
            self._forbidden[place] = forbidden
            if len(self._forbidden) > _KEPT_MASKS:
                del self._forbidden[min(self._forbidden)]
        if forbidden.device != scores.device:
            forbidden = self._forbidden[place] = forbidden.to(scores.device)
        return scores.masked_fill(forbidden, float("-inf"))

    def advance(self, token: int) -> None:
        """The output continues with this token.

        Raises:
            DeliberateError: the grammar does not allow it here.
        """
        if self._ended or not self._accept(token):
            raise DeliberateError(
                f"the grammar does not allow token {token} at generated token {len(self._tokens)}"
            )
        place = len(self._tokens)
        if self._removed and self._removed[0] == token:
            del self._removed[0]
        else:
            self._removed.clear()
            self._forget(place + 1)
        self._tokens.append(token)

    def rollback(self, count: int) -> None:
        """Removes the last `count` tokens."""
        if count == 0:
            return
        removed = self._tokens[-count:]
        del self._tokens[-count:]
        parsed = count - self._ended  # the parser is not told of an end token
        self._ended = False
        if parsed and not self._matcher.rollback(parsed):
            raise RuntimeError(f"llguidance rolls back no {parsed} tokens")
        self._removed[:0] = removed

    def forced(self) -> list[int]:
        """Tokens that follow from the grammar; an end token where nothing else may come."""
        if self._ended:
            return []
        if self._matcher.is_stopped():
            return [self._ends[0]]
        return list(self._matcher.compute_ff_tokens())

    def _accept(self, token: int) -> bool:
        if token in self._ends:
            self._ended = bool(self._matcher.is_accepting())
            return self._ended
        # A token that is refused would leave the parser in an error for good.
        allowed = not self._matcher.is_stopped() and self._matcher.validate_tokens([token]) == 1
        return allowed and bool(self._matcher.consume_token(token))

    def _forget(self, first: int) -> None:
        """Drops the masks of states that other tokens led to."""
        for place in [place for place in self._forbidden if place >= first]:
            del self._forbidden[place]

    def _compute(self) -> Tensor:
        """Which tokens may not come next, bool ``[V]``."""
        matcher = self._matcher
        allowed = np.zeros(self._vocabulary, dtype=bool)
        if not self._ended:
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
                bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
                allowed[:] = bits[: self._vocabulary]
            allowed[list(self._ends)] = matcher.is_accepting()
        return torch.from_numpy(~allowed)


def _llguidance() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise DeliberateError(
            f"structured output needs the package `llguidance`: {install_extra('structured')}"
        ) from error
    return llguidance


def _tokenizer(library: Any, tokenizer: Any, ends: tuple[int, ...], vocabulary: int) -> Any:
    """llguidance's form of a tokenizer, kept as long as the tokenizer is (0.6 s for 49k tokens)."""
    if tokenizer is None:
        raise DeliberateError("structured output needs the tokenizer: pass tokenizer=...")
    size = len(tokenizer)
    if size > vocabulary:
        raise DeliberateError(
            f"the tokenizer has {size} tokens and the model's logits {vocabulary}: structured "
            "output needs the model's own tokenizer"
        )
    kept = _TOKENIZERS.setdefault(tokenizer, {})
    key = (size, ends, vocabulary)
    if key not in kept:
        try:
            kept[key] = library.hf.from_tokenizer(
                tokenizer, n_vocab=vocabulary, eos_token=list(ends)
            )
        except Exception as error:
            raise DeliberateError(
                f"structured output cannot use a {type(tokenizer).__name__}: "
                f"{' '.join(str(error).split())}; a fast tokenizer of transformers is needed"
            ) from error
    return kept[key]


def _schema_text(value: Any) -> str:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        value = parse_json(value, "structured json_schema")
    if not isinstance(value, Mapping | bool):
        raise DeliberateError(
            f"structured json_schema={_short(value)}: give a dict, JSON text or a pydantic model"
        )
    return json.dumps(value)


def _choices_text(value: Any) -> str:
    texts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise DeliberateError(
            f"structured choice={_short(value)}: give a list of texts, none empty, {_EXAMPLE}"
        )
    return json.dumps(texts, ensure_ascii=False)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
