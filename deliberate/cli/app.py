"""The `deliberate` command. Each subcommand imports what it needs when it runs, so that help and
errors in the command line cost no import of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deliberate import __version__
from deliberate.cli.architectures import architectures
from deliberate.cli.environment import environment
from deliberate.cli.export import export
from deliberate.cli.reasoning_options import (
    BudgetOption,
    ReasoningOption,
    VotesOption,
    VoteTokensOption,
    print_reasoned,
    reasoning_arguments,
)
from deliberate.cli.serve import ThreadsOption, WeightsOption, serve, use_threads
from deliberate.cli.settings_help import no_options, settings_help
from deliberate.cli.structured_options import structured_argument
from deliberate.cli.versions import evolve, swap, versions
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.errors import DeliberateError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FORWARD_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
EXACTNESS_BROKEN = 1
HELP = {"-h", "--help"}

app = typer.Typer(
    name="deliberate",
    help="Adaptive-depth inference for causal language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"deliberate {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model or its exits (Hydra: overrides, --multirun, --cfg job, --help)."""
    from deliberate.train.app import main as train_main

    train_main(context.args)


@app.command(context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def fit(context: typer.Context) -> None:
    """Fit exits and a draft layer to a checkpoint without them (MODEL out=DIR ..., --help)."""
    from deliberate.train.draft.fit_command import main as fit_main

    _quiet_transformers()
    fit_main(context.args)


@app.command("eval", context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Run a task dense and adaptive and write a report (task=NAME model=NAME ..., --help)."""
    if HELP & set(context.args):
        settings_help("eval", context.args)
        return
    no_options("eval", context.args)
    from deliberate.eval.tasks.registry import evaluation_config

    cfg = evaluation_config(context.args)
    if cfg.reasoning is not None or cfg.samples is not None:
        from deliberate.eval.reasoning.run import evaluate as evaluate_reasoning

        _quiet_transformers()
        evaluate_reasoning(cfg, context.args)
        return
    _run(cfg)


@app.command(context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def calibrate(context: typer.Context) -> None:
    """Calibrate a model's exits and certify a policy (task=NAME size=N out=DIR ..., --help)."""
    if HELP & set(context.args):
        settings_help("calibrate", context.args)
        return
    no_options("calibrate", context.args)
    from deliberate.eval.calibrate.command import calibration_config

    cfg = calibration_config(context.args)
    _quiet_transformers()
    from rich.console import Console

    from deliberate.eval.calibrate.command import calibrate as run_calibration
    from deliberate.eval.calibrate.tables import print_calibration

    print_calibration(Console(highlight=False), run_calibration(cfg))


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that eval wrote.", metavar="DIR...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the page: DIR itself, or reports/compare.")
    ] = None,
) -> None:
    """Rebuild the report of one run, or compare several."""
    from deliberate.eval.runner.command import rebuild_report

    print(rebuild_report(folders, out))


@app.command()
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
) -> None:
    """Answer a question, tokens coloured by the layer where they were chosen."""
    if not question.strip():
        raise DeliberateError("the question is empty: give it as one quoted argument")
    if fidelity is None:
        budgeted = any(value is not None for value in (budget_ms, deadline_ms, tier))
        fidelity = "budget" if budgeted else "exact"
    _quiet_transformers()
    from rich.console import Console

    from deliberate.api import checkpoint
    from deliberate.api.model import AdaptiveModel, as_fidelity
    from deliberate.data.prompts import PROMPT
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
    if chains := reasoning_arguments(reasoning, thinking_token_budget, votes, vote_tokens):
        chains |= {"fidelity": fidelity, "thresholds": threshold, "structured": structured}
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
            guarantee=guarantee,
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


@app.command()
def demo(
    problems: Annotated[int, typer.Option(help="Problems to answer.")] = 24,
    model: Annotated[str, typer.Option(help="A real one is asked GSM8K, where it is.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("reports/demo"),
) -> None:
    """Evaluate the bundled model on fresh word problems, or a real one, in a few minutes."""
    from deliberate.eval.tasks.registry import demo_config

    _run(demo_config(problems, str(out), model))


@app.command(context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure exits and speed on this machine (NAME ..., --help)."""
    from deliberate.eval.benchmarks.settings import overview, run_benchmark, settings

    named = [argument for argument in context.args if not argument.startswith("-")]
    flags = [argument for argument in context.args if argument.startswith("-")]
    if not context.args or (flags and not named and set(flags) <= HELP):
        print(overview())
        return
    if HELP & set(flags):
        print(settings(named[0], named[1:]), end="")
        return
    no_options("bench", flags)
    _quiet_transformers()
    run_benchmark(context.args)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2", metavar="NAME")],
) -> None:
    """Download a real model into the cache folder, once; NAME then works like `tiny`."""
    from deliberate.api.fetch import FETCHABLE, fetch

    print(f"{fetch(name)}: {FETCHABLE[name].what}")


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    model: Annotated[Path, typer.Argument(help="Where the packed model is, or is to be.")],
    evaluations: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders that eval wrote about it.", metavar="DIR..."),
    ] = None,
) -> None:
    """Pack a trained model (bfloat16) and write its card from the run and evaluations."""
    from deliberate.api.checkpoint import CONFIG_NAME
    from deliberate.eval.card import pack, write_card

    if not (model / CONFIG_NAME).is_file():
        pack(run, model)
    print(write_card(run, model, evaluations or []))


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print versions, devices, threads, models, data, and what is missing."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    from deliberate.eval.report.terminal import environment_table

    Console(highlight=False).print(environment_table(facts))


for _command in (serve, swap, versions, evolve, architectures):
    app.command()(_command)
app.add_typer(export, name="export")


@app.command("lm-eval", context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness with this project's models (its own options: --tasks, --model_args)."""
    from deliberate.eval.lm_evaluation.command import main as harness_main

    harness_main(context.args)


def _run(cfg: DictConfig) -> None:
    """Evaluates, prints the table and the report's path; status 1 where exact and dense differ."""
    _quiet_transformers()
    from rich.console import Console

    from deliberate.eval.report.terminal import summary_table
    from deliberate.eval.runner import command as evaluation

    done = evaluation.evaluate(cfg)
    broken = evaluation.departure_text(done.broken) if done.broken else None
    console = Console(highlight=False)
    console.print(summary_table(done.result))
    for note in done.result.notes:
        if note != broken:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"report: {done.report}", markup=False, soft_wrap=True)
    if broken:
        warning = Console(stderr=True, highlight=False, markup=False)
        warning.print(f"warning: {broken}", style="bold red", soft_wrap=True)
        raise typer.Exit(EXACTNESS_BROKEN)


def _quiet_transformers() -> None:
    """Turns off the progress bars of loading weights, which would break up an answer."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; an error is one line on stderr and status 2, Ctrl-C is status 130."""
    with one_line_errors():
        try:
            given = list(sys.argv[1:] if arguments is None else arguments)
            status = app(given, standalone_mode=False)
        except typer.Abort:
            raise KeyboardInterrupt from None
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
