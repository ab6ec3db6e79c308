"""What is chosen about the reasoning of a generation: where it stops, its limits, its votes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from deliberate.reasoning.answer_probes import Same, same_text
from deliberate.reasoning.registry import STOP_POLICIES, chain_policy
from deliberate.reasoning.stop_policy import StopPolicy, settings_of
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.reasoning.trial_answers import word_tokens
from deliberate.reasoning.votes import VOTE_RULES, FixedVotes, VoteRule
from deliberate.utils.checks import at_least, settings_given, word_list
from deliberate.utils.errors import DeliberateError

NONE = "none"
"""The name for no stop policy: a chain ends by itself or by its limits."""
# NoWait (arXiv:2506.08343): the words that it bans.
SWITCH_WORDS = ("wait", "alternatively", "hmm", "but", "however", "check", "maybe", "verify")
# Kept for the answer where nothing says how much: so many tokens, and at most this share.
_ANSWER_TOKENS, _ANSWER_SHARE = 16, 0.25

Encode = Callable[[str], Sequence[int]]


def kept_for_answer(limit: int) -> int:
    """Tokens of an output of `limit` that reasoning may not use."""
    return max(1, min(_ANSWER_TOKENS, int(_ANSWER_SHARE * limit)))


@dataclass(frozen=True)
class ReasoningSettings:
    """Settings of the reasoning; ``generate(reasoning=)`` takes them, or a part of them.

    Attributes:
        policies: stop policies by name (`deliberate.reasoning.registry`), each with its settings or
            None for the source's; empty: none.
        budget: tokens of reasoning at most; None: as many as leave room for the answer.
        answer: tokens kept for the answer; None: up to 16, at most a quarter of the output.
        extensions: how often the end of the reasoning is put off by `extension` (s1).
        extension: the text that takes the place of the closing tag then.
        suppressed: words that the reasoning must not hold (NoWait); true: those of the source.
        tags: opening and closing tag; an empty opening tag: outputs begin with reasoning. None: the
            model's own.
        same: whether two answers are equal, in stop policies and votes; by default their texts are
            compared. The server and the command line compare them as the grader does.
        lead_in: text between the closing tag and an answer that is forced; None: what the model was
            trained to write there, where its configuration says so.

    Raises:
        DeliberateError: an unknown policy, or a value that is not allowed.
    """

    policies: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    budget: int | None = None
    answer: int | None = None
    extensions: int = 0
    extension: str = "Wait"
    suppressed: tuple[str, ...] | bool = False
    tags: tuple[str, str] | None = None
    lead_in: str | None = None
    same: Same = same_text

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Mapping):
            raise DeliberateError(f"policies={self.policies!r:.60}: give settings by policy")
        for name, given in self.policies.items():
            settings_of(STOP_POLICIES, name, given)
        if self.budget is not None:
            at_least("budget", self.budget, 0)
        if not callable(self.same):
            raise DeliberateError(f"same={self.same!r:.60}: give a function of two answers")
        if self.answer is not None:
            at_least("answer", self.answer, 1)
        at_least("extensions", self.extensions, 0)
        if not isinstance(self.extension, str) or not self.extension.strip():
            raise DeliberateError(f"extension={self.extension!r}: give a word, such as 'Wait'")
        if self.suppressed is True:
            words: tuple[str, ...] = SWITCH_WORDS
        elif self.suppressed is False or self.suppressed is None:
            words = ()
        else:
            words = word_list("suppressed", self.suppressed, ", or true")
        object.__setattr__(self, "suppressed", words)
        if self.lead_in is not None and not isinstance(self.lead_in, str):
            raise DeliberateError(f"lead_in={self.lead_in!r:.60}: give a text")
        if self.tags is not None:
            tags = (
                ()
                if isinstance(self.tags, str) or not isinstance(self.tags, Sequence)
                else tuple(self.tags)
            )
            if len(tags) != 2 or not all(isinstance(tag, str) for tag in tags) or not tags[1]:
                raise DeliberateError(
                    f"tags={self.tags!r:.60}: give an opening and a closing tag; an empty opening "
                    "tag where outputs begin with reasoning, e.g. ['', '####']"
                )
            object.__setattr__(self, "tags", tags)

    @classmethod
    def of(cls, given: Any) -> ReasoningSettings:
        """From a policy's name, ``none``, or a mapping of policies and fields together.

        ``{"probe": {"chunk": 32}, "budget": 200}`` is the policy ``probe`` with a limit.

        Raises:
            DeliberateError: none of these, or an unknown name.
        """
        if isinstance(given, ReasoningSettings):
            return given
        if isinstance(given, str):
            given = {} if given == NONE else {given: None}
        if not isinstance(given, Mapping):
            raise DeliberateError(f"reasoning={given!r:.60}: give a policy's name or settings")
        known = {one.name for one in fields(cls)}
        own = {name: value for name, value in given.items() if name in known}
        policies = {name: value for name, value in given.items() if name not in known}
        for name in policies:
            if name not in STOP_POLICIES:
                raise DeliberateError(
                    f"reasoning={name!r} is neither a stop policy ({', '.join(STOP_POLICIES)}, "
                    f"{NONE}) nor a setting ({', '.join(sorted(known))})"
                )
        if policies and own.get("policies"):
            raise DeliberateError("reasoning names policies twice: by name and in `policies`")
        return cls(**{"policies": policies} | own)

    def policy(
        self, encode: Encode, policies: Mapping[str, Mapping[str, Any] | None] | None = None
    ) -> StopPolicy | None:
        """The stop policy of one chain; None for none.

        Args:
            encode: ids of a text, without special tokens.
            policies: these in place of its own, as where a model has completed them.
        """
        chosen = self.policies if policies is None else policies
        return chain_policy(chosen, encode, self.same) if chosen else None

    def limits(self, max_new_tokens: int, encode: Encode) -> BudgetSettings:
        """The limits of an output.

        Args:
            max_new_tokens: of it.
            encode: ids of a text, without special tokens.
        """
        words = self.suppressed if isinstance(self.suppressed, tuple) else ()
        each = [form for word in words for form in (word.lower(), word.capitalize())]
        return BudgetSettings(
            max_new_tokens,
            self.budget,
            kept_for_answer(max_new_tokens) if self.answer is None else self.answer,
            self.extensions,
            tuple(encode(self.extension)) if self.extensions else (),
            tuple(sorted(word_tokens(each, encode))),
        )


def vote_rule(given: Any) -> VoteRule:
    """The rule of a vote: from a count, a rule's name, or ``{name: settings}``.

    Raises:
        DeliberateError: none of these, or a value that is not allowed.
    """
    if hasattr(given, "wanted"):
        return given  # type: ignore[no-any-return]
    if isinstance(given, int) and not isinstance(given, bool):
        return FixedVotes(at_least("votes", given, 1))
    if isinstance(given, str):
        given = {given: None}
    if not isinstance(given, Mapping) or len(given) != 1:
        raise DeliberateError(
            f"votes={given!r:.60}: give a number of chains, or one of {', '.join(VOTE_RULES)}"
        )
    ((name, settings),) = given.items()
    if name not in VOTE_RULES:
        raise DeliberateError(
            f"votes={name!r} is unknown: give a number of chains, or one of {', '.join(VOTE_RULES)}"
        )
    kind = VOTE_RULES[name]
    try:
        return kind(**settings_given(f"vote rule {name!r}", kind, settings))
    except TypeError as error:
        raise DeliberateError(f"votes={name!r}: {error}") from None


@dataclass(frozen=True)
class VoteGroup:
    """The chains of one vote.

    Attributes:
        rule: how many are sampled.
        tokens: of all of them together at most, with their probes and what is rolled back; None: no
            such limit.
    """

    rule: VoteRule
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            at_least("votes.tokens", self.tokens, 1)

    @classmethod
    def of(cls, given: Any) -> VoteGroup:
        """From what `vote_rule` takes, or a rule with `tokens`.

        ``{"adaptive": {"most": 20}, "tokens": 2000}`` is a vote under one budget.

        Raises:
            DeliberateError: as `vote_rule`, or a number of tokens that is not allowed.
        """
        if isinstance(given, VoteGroup):
            return given
        tokens = None
        if isinstance(given, Mapping) and "tokens" in given:
            tokens = given["tokens"]
            given = {name: value for name, value in given.items() if name != "tokens"}
        return cls(vote_rule(given), tokens)
