"""The options of `deliberate generate` for chains of reasoning and votes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json
from deliberate.utils.typed_text import typed_text

ReasoningOption = Annotated[
    str | None,
    typer.Option(
        help="Stop policy of the reasoning: probe, deer, give_up, variance, ..., none; or policies "
        'with their settings as JSON, such as {"variance": {"action": "fork"}}.'
    ),
]
BudgetOption = Annotated[int | None, typer.Option(help="Most tokens of reasoning.")]
VoteTokensOption = Annotated[
    int | None, typer.Option(help="Most tokens of all chains of a vote together.")
]
VotesOption = Annotated[
    str | None,
    typer.Option(help="Chains that vote: a number, or a rule: adaptive, decided, ..."),
]
TagsOption = Annotated[
    tuple[str, str] | None,
    typer.Option(help="Tags around the model's reasoning, where it does not name its own."),
]
# Of the chains of a vote, which greedy decoding would make all the same.
_TEMPERATURE = 0.7


def reasoning_arguments(
    reasoning: str | None,
    budget: int | None,
    votes: str | None,
    tokens: int | None = None,
    tags: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments ``reasoning`` and ``votes`` of `generate`, and how chains are sampled.

    Empty where no option is given.

    Args:
        reasoning: a stop policy's name, or policies with their settings as JSON.
        budget: tokens of reasoning of a chain.
        votes: a number of chains or a rule's name.
        tokens: of all chains of a vote together.
        tags: around the reasoning, as they are typed.

    Raises:
        DeliberateError: `tokens` without a vote, `tags` of a reasoning that nothing looks at, a
            setting that is given twice, or text that is not JSON.
    """
    made: dict[str, Any] = {}
    if tags is not None and reasoning is None and budget is None and votes is None:
        raise DeliberateError(
            f"--reasoning-tags {tags[0]} {tags[1]} alone: give --reasoning NAME|none, "
            "--thinking-token-budget N or --votes with them"
        )
    if reasoning is not None or budget is not None or tags is not None:
        policies: dict[str, Any] = {}
        if reasoning is not None and reasoning.lstrip().startswith("{"):
            policies = parse_json(reasoning, "--reasoning")
        elif reasoning not in (None, "none"):
            policies = {str(reasoning): None}
        if budget is not None and "budget" in policies:
            raise DeliberateError(
                f"--thinking-token-budget {budget} and budget in --reasoning: give one of them"
            )
        if tags is not None and "tags" in policies:
            raise DeliberateError("--reasoning-tags and tags in --reasoning: give one of them")
        if budget is not None:
            policies["budget"] = budget
        if tags is not None:
            policies["tags"] = (typed_text(tags[0]), typed_text(tags[1]))
        made["reasoning"] = policies
    if votes is not None:
        given: Any = int(votes) if votes.isdigit() else votes
        if tokens is not None:
            rule = {"fixed": {"most": given}} if isinstance(given, int) else {given: None}
            given = {**rule, "tokens": tokens}
        made["votes"] = given
        made |= {"do_sample": True, "temperature": _TEMPERATURE}
    elif tokens is not None:
        raise DeliberateError(f"--vote-tokens {tokens} without --votes: give a rule of votes too")
    return made


def print_reasoned(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    arguments: Mapping[str, Any],
    max_new_tokens: int,
) -> None:
    """Answers by chains of reasoning, and prints the chain's text and what was done along the way.

    Args:
        model: an `AdaptiveModel`.
        tokenizer: of it.
        prompt: token ids.
        arguments: of `generate`; those that cannot be combined with reasoning are refused there.
        max_new_tokens: of a chain.

    Raises:
        DeliberateError: as `generate`.
    """
    import torch
    from rich.console import Console

    from deliberate.eval.grading.equality import same_answer

    reasoning = {**(arguments.get("reasoning") or {}), "same": same_answer}
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        ids,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **{"do_sample": False} | dict(arguments) | {"reasoning": reasoning},
    )
    console = Console(highlight=False)
    chain = output.chains[0]
    text = tokenizer.decode(chain.tokens, skip_special_tokens=True)
    console.print(text.strip(), markup=False, soft_wrap=True)
    for probe in chain.probes:
        line = f"probe at {probe.at} tokens: {probe.answer} (confidence {probe.confidence:.2f})"
        console.print(line, markup=False, style="dim", soft_wrap=True)
    end = chain.stopped or "it ended by itself or at its limit"
    facts = f"{chain.reasoning_tokens} tokens of reasoning; {end}"
    if chain.probes:
        probes = "1 probe" if len(chain.probes) == 1 else f"{len(chain.probes)} probes"
        facts += f"; {probes} cost {chain.probe_tokens} tokens"
    if chain.triggers:
        facts += f"; {len(chain.triggers)} triggers, {chain.reweighed} tokens re-weighed"
    if chain.forks:
        facts += f"; {chain.forks} forks, {chain.rolled_back} tokens of them not kept"
    console.print(facts, markup=False, style="dim", soft_wrap=True)
    for vote in output.votes or ():
        pairs = zip(vote.tally.answers, vote.tally.counts, strict=True)
        counts = ", ".join(f"{answer}: {count}" for answer, count in pairs)
        console.print(
            f"{len(vote.chains)} chains, {vote.tokens} tokens; votes {counts}",
            markup=False,
            style="dim",
            soft_wrap=True,
        )
