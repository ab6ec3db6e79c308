"""`deliberate generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deliberate.cli.drafting_options import (
    DraftsOption,
    DraftTokensOption,
    KvStorageOption,
    LookupTokensOption,
    drafting_arguments,
)
from deliberate.cli.progress_bars import quiet_transformers
from deliberate.cli.reasoning_options import (
    BudgetOption,
    ReasoningOption,
    TagsOption,
    VotesOption,
    VoteTokensOption,
    print_reasoned,
    reasoning_arguments,
)
from deliberate.cli.serve import ThreadsOption, WeightsOption, use_threads
from deliberate.cli.structured_options import structured_argument
from deliberate.utils.errors import DeliberateError


def generate(
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[str, typer.Option(help="Bundled model, folder or hub name.")] = "tiny",
    fidelity: Annotated[
        str | None,
        typer.Option(help="exact (default), threshold, dense, certified or budget."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least confidence to exit early; the model's own by default."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens to generate; 256 by default, with certified those of its certificate."
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is.")] = False,
    chat: Annotated[
        str, typer.Option(help="Chat template: auto (where there is one), always or never.")
    ] = "auto",
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="budget: mean milliseconds per token.")
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="budget: milliseconds for the answer.")
    ] = None,
    tier: Annotated[str | None, typer.Option(help="budget: L1, L2 or L3.")] = None,
    risk: Annotated[str, typer.Option(help="certified: accuracy or token.")] = "accuracy",
    epsilon: Annotated[float | None, typer.Option(help="certified: largest risk.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="certified: largest probability that the risk is exceeded.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder that calibrate wrote; the model's own by default.")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="auto (our kernels where they support the model), generic or fused.")
    ] = "auto",
    weights: WeightsOption = "float",
    threads: ThreadsOption = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the answer obeys.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches it.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is one of these; once for each.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File with a grammar (EBNF or Lark) of the answer.")
    ] = None,
    reasoning: ReasoningOption = None,
    thinking_token_budget: BudgetOption = None,
    votes: VotesOption = None,
    vote_tokens: VoteTokensOption = None,
    reasoning_tags: TagsOption = None,
    drafts: DraftsOption = None,
    draft_tokens: DraftTokensOption = None,
    lookup_tokens: LookupTokensOption = None,
    kv_storage: KvStorageOption = None,
) -> None:
    """Answer a question, tokens coloured by the layer where they were chosen."""
    if not question.strip():
        raise DeliberateError("the question is empty: give it as one quoted argument")
    if fidelity is None:
        budgeted = any(value is not None for value in (budget_ms, deadline_ms, tier))
        fidelity = "budget" if budgeted else "exact"
    quiet_transformers()
    from rich.console import Console

    from deliberate.api import checkpoint
    from deliberate.api.model import AdaptiveModel, as_fidelity
    from deliberate.data.prompts import PROMPT
    from deliberate.engine.spec import spec_of
    from deliberate.eval.report.terminal import Stream, print_answer
    from deliberate.eval.runner.guarantee_check import (
        certificate_notes,
        certified_limit,
        guarantee_arguments,
    )
    from deliberate.eval.tasks.prompts import question_encoder, run_conditions
    from deliberate.utils.end_tokens import end_tokens

    if raw and chat == "always":
        raise DeliberateError(
            "--raw sends the text as it is, --chat always in a template: give one of the two"
        )
    as_fidelity(fidelity)  # a typo is reported before the model is loaded
    structured = structured_argument(json_schema, regex, choice, grammar)
    chains = reasoning_arguments(
        reasoning, thinking_token_budget, votes, vote_tokens, reasoning_tags
    )
    drafting = drafting_arguments(drafts, draft_tokens, lookup_tokens, kv_storage)
    spec_of(None, drafting | {"fidelity": fidelity})  # before the model is loaded
    guarantee = guarantee_arguments(
        fidelity,
        budget=(budget_ms, deadline_ms, tier),
        certificate={"risk": risk, "epsilon": epsilon, "delta": delta},
    )
    use_threads(threads)
    adaptive = AdaptiveModel.from_pretrained(model, executor=executor, weights=weights)
    if calibration is not None:
        adaptive.set_calibration(calibration)
    tokenizer = checkpoint.load_tokenizer(model)
    encoder = question_encoder(
        tokenizer,
        chat="never" if raw else chat,
        system=system,
        max_tokens=sys.maxsize,
        template="{question}" if raw else PROMPT,
    )
    if chains:
        chains |= {"fidelity": fidelity, "thresholds": threshold, "structured": structured}
        chains |= drafting
        prompt = encoder.prompt(question)
        print_reasoned(adaptive, tokenizer, prompt, chains | guarantee, max_new_tokens or 256)
        return
    end = end_tokens(adaptive.base.generation_config, tokenizer)

    def stream(tokens: int) -> Stream:
        return Stream(
            adaptive,
            encoder.prompt(question),
            fidelity=fidelity,
            threshold=threshold,
            max_new_tokens=tokens,
            end_tokens=end,
            guarantee=guarantee | drafting,
            structured=structured,
            tokenizer=tokenizer,
        )

    limit = max_new_tokens
    if limit is None:
        known = certified_limit(adaptive, guarantee) if fidelity == "certified" else None
        limit = 256 if known is None else known
    answer = stream(limit)
    list(stream(min(4, limit)))  # the first pass in a process is slow: not timed
    layers = [*adaptive.exit_config.layers, adaptive.backbone.num_layers]
    console = Console(highlight=False)
    print_answer(console, answer, tokenizer, layers)
    if fidelity == "certified":
        conditions = run_conditions(
            encoder, task=None, max_new_tokens=limit, dtype=adaptive.base.dtype
        )
        conditions.pop("max_new_tokens")  # more than the certificate's are refused, fewer are fine
        for note in certificate_notes(adaptive, guarantee, conditions, tokenizer):
            console.print(f"note: {note}", markup=False, soft_wrap=True)
