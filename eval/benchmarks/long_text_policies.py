"""Long continuations by stop policies that act on repetition, for `deliberate bench longtext`.

A text is run as a chain of reasoning that ends where the text does: the end token is its closing
tag. So a policy can fork it or roll it back, which `generate` of a plain text does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deliberate.api.model import AdaptiveModel
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.registry import STOP_POLICIES, chain_policy
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import settings_of
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.utils.checks import one_of
from deliberate.utils.errors import DeliberateError

ACTING = tuple(name for name, one in STOP_POLICIES.items() if not one.stops)
"""Stop policies that let a text go on another way."""
# Continuations of a fork that run beside one another.
_ROWS = 8


class Continued(NamedTuple):
    """A text and what was done along the way.

    Attributes:
        tokens: ids.
        triggers: how often it was acted.
        reweighed: tokens that were re-weighed.
    """

    tokens: list[int]
    triggers: int
    reweighed: int


def policy_variants(given: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Policies with their settings, each ``{name: settings}``, by what they are called in tables.

    Raises:
        DeliberateError: one that does not act on repetition, or a setting that it does not have.
    """
    made: dict[str, Mapping[str, Any]] = {}
    for one in given:
        if not isinstance(one, Mapping) or len(one) != 1:
            raise DeliberateError(f"policies={one!r:.60}: give {{NAME: settings}} for each")
        ((name, settings),) = one.items()
        settings_of(STOP_POLICIES, one_of("policies", name, ACTING), settings)
        own = [
            str(value) if key == "action" else f"{key}={value}"
            for key, value in (settings or {}).items()
        ]
        made[" ".join((name, *own))] = one
    return made


class PolicyTexts:
    """Continues prompts by policies.

    Args:
        model: continues.
        tokenizer: of it.
        ends: end tokens.
        new_tokens: of a text.
        until_end: a text may end before.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        tokenizer: Any,
        ends: Sequence[int],
        new_tokens: int,
        *,
        until_end: bool,
    ) -> None:
        self._ends = tuple(ends)
        # The end token is forced after the last token, and takes the place of an answer.
        self._budget = BudgetSettings(new_tokens + 2, new_tokens, answer=1)
        self._until_end = until_end
        engine = model.engine(max_running=_ROWS)
        marks = ReasoningMarks(closing=(self._ends[0],))
        self._runner = ChainRunner(engine, marks, tokenizer.decode, end_tokens=self._ends)

    def text(
        self,
        prompt: Sequence[int],
        policies: Mapping[str, Any],
        *,
        seed: int | None,
        temperature: float = 1.0,
    ) -> Continued:
        """One continuation, in dense decoding.

        Args:
            seed: of the noise that tokens are sampled with; None: greedy.
        """
        from transformers import SuppressTokensLogitsProcessor, TemperatureLogitsWarper

        processors: list[Any] = []
        if not self._until_end:
            processors.append(SuppressTokensLogitsProcessor(list(self._ends), device="cpu"))
        if seed is not None:
            processors.append(TemperatureLogitsWarper(temperature))

        def sampling(start: int) -> TokenChooser:
            return TokenChooser(processors, sample=seed is not None, seed=(seed or 0) + start)

        request = ChainRequest(
            prompt,
            self._budget,
            chain_policy(policies, lambda text: []),
            DecodingSpec(fidelity="dense"),  # type: ignore[arg-type]
            sampling if processors else None,
        )
        (done,) = self._runner.run([request])
        acted = done.forks or len(done.triggers)
        return Continued(done.tokens[: done.reasoning_tokens], acted, done.reweighed)
