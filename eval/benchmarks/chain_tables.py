"""Tables of `deliberate bench chains`: what each rule saves and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from deliberate.calibration.certificate import Testing
from deliberate.eval.statistics import PairedAccuracy, paired_accuracy
from deliberate.reasoning.chain_certificates import Resampled
from deliberate.reasoning.chain_replay import RuleOutcome
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet


@dataclass(frozen=True)
class RuleRow:
    """One rule against the whole chains.

    Attributes:
        name: of the rule.
        accuracy: share of right answers; None without references.
        versus_whole: paired, against the whole chains.
        versus_cut: paired, against cutting every chain at the length that makes as many tokens.
        cut: that control's name.
        tokens: of reasoning, mean.
        saved: share of the reasoning tokens that were not made.
        probe_share: share of all tokens that probes cost.
        changed: share of answers that are other than the whole chain's.
        seconds: mean of a chain, by the measured costs.
        speedup: whole chains' seconds / these.
        gave_up: chains that were given up.
        moved: most tokens between where the rule looked and the recorded probe that answered.
        stops: tokens of reasoning of each chain.
    """

    name: str
    accuracy: float | None
    versus_whole: PairedAccuracy | None
    versus_cut: PairedAccuracy | None
    cut: str | None
    tokens: float
    saved: float
    probe_share: float
    changed: float
    seconds: float
    speedup: float
    gave_up: int
    moved: int
    stops: tuple[int, ...]


def rule_row(
    done: RuleOutcome, whole: RuleOutcome, control: RuleOutcome | None, costs: ChainCosts
) -> RuleRow:
    """The figures of a rule.

    Args:
        control: the chains cut at the length that makes as many tokens; None for a cut itself.
    """
    size, right = len(done.replayed), done.right
    seconds = done.seconds(costs)
    versus_whole, versus_cut = None, None
    if right is not None and whole.right is not None:
        versus_whole = paired_accuracy(right, whole.right)
        if control is not None and control.right is not None:
            versus_cut = paired_accuracy(right, control.right)
    return RuleRow(
        done.name,
        None if right is None else sum(right) / size,
        versus_whole,
        versus_cut,
        None if control is None else control.name,
        sum(one.tokens for one in done.replayed) / size,
        done.tokens_saved,
        done.probe_share,
        sum(done.changed) / size,
        seconds / size,
        whole.seconds(costs) / seconds,
        sum(one.gave_up for one in done.replayed),
        max(one.moved for one in done.replayed),
        tuple(one.tokens for one in done.replayed),
    )


def show_rules(console: Console, rows: list[RuleRow], chains: ChainSet) -> None:
    """The table of rules. Tokens saved without time saved are printed in red."""
    measured = chains.header.costs is not None
    table = Table(title=f"{len(chains.chains)} recorded chains, every rule on the same ones")
    for name in ("rule", "right", "tokens", "saved", "probes", "changed", "time"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    table.add_column("against a cut of as many tokens")
    for row in rows:
        slow = row.saved > 0 and row.speedup < 1.0
        time = f"{row.speedup:.2f}x"
        table.add_row(
            row.name,
            "-" if row.accuracy is None else f"{row.accuracy:.1%}",
            f"{row.tokens:.0f}",
            f"{row.saved:.0%}",
            f"{row.probe_share:.0%}",
            f"{row.changed:.1%}",
            f"[bold red]{time}[/]" if slow else time,
            _against(row),
        )
    console.print(table)
    if any(row.saved > 0 and row.speedup < 1.0 for row in rows):
        console.print("red: tokens are saved and time is not", style="bold red")
    if not measured:
        console.print("time: tokens, probes' tokens included; no seconds were measured")
    moved = max(row.moved for row in rows)
    if moved:
        console.print(
            f"answers of rules that stop where no probe was recorded are of up to {moved} tokens "
            "before"
        )


def _against(row: RuleRow) -> str:
    versus = row.versus_cut
    if versus is None:
        return ""
    low, high = versus.interval.low, versus.interval.high
    return (
        f"{100 * versus.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points, "
        f"p = {versus.mcnemar.p:.2g} ({row.cut})"
    )


def show_certificate(
    console: Console, tested: Testing, resampled: Resampled | None, loss: str
) -> None:
    """What is certified, and how often a resampled certificate is violated."""
    passed = tested.certified
    if passed is None:
        console.print(tested.refusal().replace("lambda", "probability"), soft_wrap=True)
    else:
        console.print(
            f"certified (loss: {loss}): stop from probability {passed.lambda_:g} on; "
            f"{passed.mean:.2%} of {passed.n} chains lost, risk <= {tested.epsilon:g} with "
            f"probability {1 - tested.delta:g}"
        )
    if resampled is not None:
        n = resampled.resamples
        console.print(
            f"{n} resampled testing sets: {resampled.certified / n:.1%} gave a certificate, "
            f"{resampled.violated / n:.1%} a violated one (delta = {tested.delta:g}); the naive "
            f"rule, the cheapest threshold that looks good, is violated in "
            f"{resampled.naive / n:.1%}"
        )
