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
from deliberate.cli.generate import generate
from deliberate.cli.progress_bars import quiet_transformers
from deliberate.cli.serve import serve
from deliberate.cli.settings_help import no_options, settings_help
from deliberate.cli.versions import evolve, swap, versions
from deliberate.utils.command_errors import one_line_errors

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

    quiet_transformers()
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

        quiet_transformers()
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
    quiet_transformers()
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
    quiet_transformers()
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


for _command in (generate, serve, swap, versions, evolve, architectures):
    app.command()(_command)
app.add_typer(export, name="export")


@app.command("lm-eval", context_settings=FORWARD_ARGUMENTS, add_help_option=False)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness with this project's models (its own options: --tasks, --model_args)."""
    from deliberate.eval.lm_evaluation.command import main as harness_main

    harness_main(context.args)


def _run(cfg: DictConfig) -> None:
    """Evaluates, prints the table and the report's path; status 1 where exact and dense differ."""
    quiet_transformers()
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
