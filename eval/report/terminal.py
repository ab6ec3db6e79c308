"""Coloured terminal output: an answer with the depth of every token, and tables of figures.

Colours are those of the report. Without a terminal, or with NO_COLOR set, the same text is plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.generation_inputs import within_context
from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity, as_fidelity
from deliberate.eval.report import numbers
from deliberate.eval.report.depth_colours import depth_colours
from deliberate.eval.report.detokenize import IncrementalDecoder
from deliberate.eval.report.guarantee_text import guarantee_lines
from deliberate.eval.runner.answer_notes import answer_lines
from deliberate.eval.runner.results import EvaluationResult
from deliberate.policies.controller import BudgetReport
from deliberate.trace import GenerationTrace, TokenRecord
from deliberate.utils.errors import DeliberateError

TIMES = "ms per token and speed: medians over problems of whole answers, prompt pass included"


class Stream:
    """One greedy generation whose tokens come with the layer at which they were chosen.

    Iterating yields `TokenRecord`s as their tokens are accepted (exact mode: once verified);
    `trace` is complete after that.

    Args:
        guarantee: of fidelity ``certified`` or ``budget``, and where drafts come from: fields of
            `AdaptiveDecoding`.
        structured, tokenizer: see `AdaptiveDecoding`.

    Attributes:
        verifies: early tokens are drafts that the full depth verifies.

    Raises:
        DeliberateError: a fidelity, threshold, prompt, length or guarantee that cannot work.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        prompt: Sequence[int],
        *,
        fidelity: str,
        threshold: float | None,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        guarantee: Mapping[str, Any] | None = None,
        structured: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        if not prompt:
            raise DeliberateError("the prompt is empty: give at least one token")
        if max_new_tokens < 1:
            raise DeliberateError(f"max_new_tokens={max_new_tokens} must be at least 1")
        self._prompt = torch.tensor([list(prompt)], device=model.device)
        self.verifies = as_fidelity(fidelity) is Fidelity.EXACT
        decoding = AdaptiveDecoding(
            model,
            fidelity,
            threshold,
            structured=structured,
            tokenizer=tokenizer,
            **(guarantee or {}),
        )
        self._loop = decoding.loop(
            max_new_tokens=within_context(
                max_new_tokens, len(prompt), model.backbone.max_positions
            ),
            end_tokens=end_tokens,
            prompt_tokens=len(prompt),
            prompts=list(self._prompt),
        )

    @property
    def trace(self) -> GenerationTrace:
        """What was run."""
        return self._loop.trace

    @property
    def budget(self) -> BudgetReport | None:
        """Fidelity ``budget``: the answer against its budget, once it is complete."""
        return self._loop.exit_policy.report

    def __iter__(self) -> Iterator[TokenRecord]:
        handed = 0
        with torch.inference_mode():
            for (fresh,) in self._loop.run(self._prompt):
                # A record in the output is never changed, so that its layer can be shown at once.
                yield from self._loop.records[handed : handed + len(fresh)]
                handed += len(fresh)


def print_answer(
    console: Console, stream: Stream, tokenizer: Any, layers: Sequence[int]
) -> GenerationTrace:
    """Prints tokens as they come, then the legend's counterpart: one line of figures."""
    styles = layer_styles(layers)
    coloured = console.color_system is not None and not console.no_color
    if coloured:
        legend = Text("chosen at layer ")
        for layer in layers:
            legend.append(f" {layer} ", styles[layer]).append(" ")
        console.print(legend)
    pieces = IncrementalDecoder(tokenizer)
    began = False
    for record in stream:
        piece = pieces.push(record.token)
        if not began:
            piece = piece.lstrip()
            began = bool(piece)
        _print_piece(console, piece, styles.get(record.exit_layer) if coloured else None)
    _print_piece(console, pieces.finish(), None)
    console.print()
    dim = "dim" if coloured else None
    console.print(trace_line(stream.trace, verifies=stream.verifies), style=dim, soft_wrap=True)
    if stream.budget is not None:
        console.print(budget_line(stream.budget), style=dim, soft_wrap=True)
    return stream.trace


def _print_piece(console: Console, piece: str, style: Style | None) -> None:
    # Background colour would run to the end of the line if it covered the line break.
    for number, line in enumerate(piece.split("\n")):
        if number:
            console.print()
        if line:
            console.print(Text(line, style or ""), end="", soft_wrap=True)


def layer_styles(layers: Sequence[int]) -> dict[int, Style]:
    """The report's colours by layer."""
    return {
        colour.layer: Style(bgcolor=colour.dark[0], color=colour.dark[1])
        for colour in depth_colours(sorted(layers))
    }


def trace_line(trace: GenerationTrace, *, verifies: bool) -> str:
    """A generation in one line.

    Args:
        verifies: early tokens were drafts that the full depth verified: exact mode.
    """
    count = len(trace.records)
    # Layer 0: the model's own drafts, looked up, or forced by what the answer must look like.
    unread = trace.exit_histogram.get(0, 0)
    chosen = ", ".join(f"{layer}: {n}" for layer, n in trace.exit_histogram.items() if layer)
    text = f"{count} tokens, chosen at layer {chosen or 'none'}"
    if unread:
        text += f", {unread} looked up, drafted by the model itself or forced"
    if count > 1:
        text += (
            f"; {numbers.number(trace.layers_per_token)} of {trace.num_layers} layers run per "
            f"token, {numbers.number(1000 * trace.seconds / count)} ms per token, prompt pass "
            "included"
        )
    early = sum(0 < layer < trace.num_layers for layer in trace.exit_layers)
    if verifies and trace.drafted:
        text += f"; drafted {trace.drafted}, rejected {trace.rejected}"
    elif not verifies and early:
        text += f"; {early} exited early, none verified"
    if trace.rounds:
        text += f"; {trace.rounds} round{'s' if trace.rounds > 1 else ''} of the gate"
    return text + ("" if trace.finish == "stop" else "; cut off at the length limit")


def budget_line(report: BudgetReport) -> str:
    """An answer against its budget in one line."""
    taken = f"{1e3 * report.seconds:.1f} ms of {report.allowed_ms:.1f} ms"
    return f"{report.budget}: {'met' if report.met else 'missed'}, {taken}" + (
        f"; hard guard at {report.guarded} steps" if report.guarded else ""
    )


def summary_table(result: EvaluationResult) -> Table:
    """The main figures of a run, one row a mode."""
    lines = [TIMES, *answer_lines(result.modes), *guarantee_lines(result)]
    table = Table(
        title=f"{result.name}: {result.task['problems']} problems",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=Text("\n".join(lines)),
        caption_justify="left",
    )
    table.add_column("mode", no_wrap=True)
    for name in ("accuracy\n[95 %]", "ms per\ntoken", "layers\nper token", "speed vs\ndense"):
        table.add_column(name, justify="right")
    table.add_column("identical\nto dense", justify="right")
    for mode, summary in result.modes.items():
        versus = summary.versus_dense
        speed, identical, broken = "–", "–", False
        if versus is not None:
            estimate = versus.speedup
            speed = f"{numbers.ratio(estimate.value)}\n{numbers.ratio_interval(estimate.interval)}"
            identical = f"{versus.identical}/{versus.problems}"
            broken = mode == "exact" and versus.identical < versus.problems
        table.add_row(
            mode,
            f"{numbers.percent(summary.accuracy)}\n"
            f"{numbers.percent_interval(summary.accuracy_interval)}",
            numbers.number(summary.shown_ms_per_token.median),
            numbers.number(summary.layers_per_token),
            Text(speed),
            Text(identical, "red" if broken else ""),
        )
    return table


def environment_table(facts: dict[str, Any]) -> Table:
    """`deliberate env` for reading."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if isinstance(value, dict):
            lines = [f"{k} {'not installed' if v is None else v}" for k, v in value.items()]
            if key == "missing":
                lines = [f"{k}: needed for {v}" for k, v in value.items()] or ["nothing"]
            table.add_row(key, Text("\n".join(lines)))
        elif isinstance(value, list):
            table.add_row(key, Text(", ".join(map(str, value)) or "none"))
        else:
            table.add_row(key, Text("not set" if value is None else str(value)))
    return table
