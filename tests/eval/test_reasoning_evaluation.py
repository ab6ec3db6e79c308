"""`deliberate eval reasoning=...`: the same problems by every rule, and controls of equal cost."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from deliberate.eval.reasoning.figures import Row, Shown, summarize
from deliberate.eval.reasoning.page import page, show
from deliberate.eval.reasoning.run import chosen_variants, evaluate
from deliberate.eval.reasoning.variants import control_of, variants
from deliberate.eval.tasks.registry import evaluation_config
from deliberate.reasoning.votes import AdaptiveConsistency, FixedVotes
from deliberate.utils.errors import DeliberateError


def row(number: int, *, right: bool, tokens: int, seconds: float, probes: int = 0) -> Row:
    shown = tuple(Shown(4 * n, "7", right) for n in range(1, probes + 1))
    return Row(
        problem=f"chains/{number}",
        answer="7",
        right=right,
        reasoning_tokens=tokens - 4,
        tokens=tokens,
        probe_tokens=5 * probes,
        chains=1,
        seconds=seconds,
        stopped="2 probes agree" if probes else None,
        probes=shown,
        length=tokens - 4,
    )


def test_every_rule_is_tried_with_every_vote_and_the_first_is_the_baseline():
    made = variants(
        ["none", {"probe": {"chunk": 8}, "budget": 40}], [1, 4, {"adaptive": {"most": 6}}]
    )
    assert [one.name for one in made] == [
        *("none", "none, 4 chains", "none, adaptive most=6 chains"),
        *("probe chunk=8 + budget=40", "probe chunk=8 + budget=40, 4 chains"),
        "probe chunk=8 + budget=40, adaptive most=6 chains",
    ]
    assert made[0].rule is None and made[1].rule == FixedVotes(4)
    assert made[3].settings.budget == 40 and list(made[3].settings.policies) == ["probe"]
    with pytest.raises(DeliberateError, match="name 'none' twice"):
        variants(["none", "none"], [1])
    with pytest.raises(DeliberateError, match="need a value each"):
        variants([], [1])


def test_an_entry_may_have_a_fidelity_of_its_own_and_its_control_has_it_too():
    plain, exact = variants(["none", {"probe": {"chunk": 8}, "fidelity": "exact"}], [1])
    assert plain.fidelity is None
    assert exact.fidelity == "exact" and exact.settings.policies == {"probe": {"chunk": 8}}
    assert "fidelity=exact" in exact.name
    assert control_of(exact, 20.0, 1.0).fidelity == "exact"
    with pytest.raises(DeliberateError, match="fidelity"):
        variants([{"probe": None, "fidelity": "certified"}], [1])


def test_a_control_spends_the_mean_compute_without_deciding():
    plain, probe, adaptive, both = (
        *variants(["none", {"probe": {"chunk": 8}}], [1]),
        *variants(["none", "probe"], ["adaptive"]),
    )
    assert control_of(plain, 30.0, 1.0) is None
    assert control_of(variants(["none"], [8])[0], 30.0, 8.0) is None
    cut = control_of(probe, 30.4, 1.0)
    assert cut.settings.policies == {"cut": {"tokens": 30}} and cut.rule is None
    assert adaptive.rule == AdaptiveConsistency()
    fixed = control_of(adaptive, 30.0, 5.6)
    assert fixed.rule == FixedVotes(6) and fixed.settings.policies == {}
    assert control_of(both, 30.0, 5.6).name.startswith("cut at 30 and 6 chains")
    (loops,) = variants([{"variance": None, "rollback": None}], [1])
    assert control_of(loops, 30.0, 1.0) is None  # neither ends a chain


def test_token_saving_without_time_saving_is_red_and_only_then():
    base = [row(n, right=True, tokens=40, seconds=1.0) for n in range(6)]
    slow = [row(n, right=n > 0, tokens=20, seconds=1.2, probes=2) for n in range(6)]
    fast = [row(n, right=True, tokens=20, seconds=0.5, probes=2) for n in range(6)]
    made = [summarize(name, rows, base) for name, rows in (("a", base), ("b", slow), ("c", fast))]
    assert [one.warning is not None for one in made] == [False, True, False]
    assert made[1].token_ratio.value == pytest.approx(0.75)  # the probes' tokens count
    assert made[1].probe_share == pytest.approx(10 / 30)
    assert made[1].against_baseline.difference == pytest.approx(-1 / 6)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    show(made, console)
    (line,) = [one for one in console.file.getvalue().split("\n") if "without time" in one]
    assert "\x1b[1;31m" in line
    text = page("A title", made, ["a fact"])
    assert text.count('class="warning"') == 1 and text.count("<svg") == 2
    assert "2 probes agree after 16 tokens; answer 7, right" in text


def test_an_evaluation_of_forks_counts_what_they_did_not_keep(tmp_path):
    forks = "{variance:{action:fork,window:2,threshold:4,tokens:4,branches:2}}"
    arguments = [
        *("task=words", "task.size=2", "task.steps=[1,2]", "warmup=0", f"out={tmp_path}"),
        *(f"reasoning=[none,{{variance:{{threshold:0}}}},{forks}]", "task.max_new_tokens=64"),
    ]
    made, _ = evaluate(evaluation_config(arguments), arguments)
    plain, idle, forked = made  # none of them has a control
    assert [one.answer for one in idle.rows] == [one.answer for one in plain.rows]
    assert idle.token_ratio.value == 1.0 and forked.token_ratio.value > 1.2


def test_an_evaluation_writes_its_table_and_page(tmp_path, capsys):
    arguments = [
        *("task=words", "task.size=3", "task.steps=[1,2]", "warmup=0", f"out={tmp_path}"),
        *("reasoning=[none,{probe:{chunk:4,agree:2}}]", "samples=[1,{adaptive:{most:4}}]"),
        *("task.max_new_tokens=96", "seed=3"),
    ]
    made, path = evaluate(evaluation_config(arguments), arguments)
    assert [one.control_of is None for one in made] == [True] * 4 + [False] * 3
    assert all(len(one.rows) == 3 for one in made)
    plain, votes, probe = made[0], made[1], made[2]
    assert plain.token_ratio.value == 1.0 and plain.probe_share == 0.0
    assert votes.chains == 4.0 and probe.probe_share > 0.0
    assert probe.control.startswith("cut at") and probe.against_control is not None
    saved = json.loads((tmp_path / "reasoning.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in saved["variants"]] == [one.name for one in made]
    assert "deliberate eval task=words" in saved["command"]
    text = path.read_text(encoding="utf-8")
    assert "<svg" in text and "probe chunk=4 agree=2 ends" in text
    assert "report:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("reasoning=[non]", "'non' is neither a stop policy"),
        ("samples=[most]", "votes='most' is unknown"),
        ("reasoning_tags=[a]", "give an opening and a closing tag"),
    ],
)
def test_rules_that_are_unknown_are_refused(given, words):
    with pytest.raises(DeliberateError, match=words):
        chosen_variants(evaluation_config(["reasoning=[none]", given]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["temperature=0.2"], "temperature=0.2 would not be read: it is read with reasoning="),
        (["controls=false"], "controls=False would not be read"),
        (["reasoning_tags=[a,b]"], "reasoning_tags=.* would not be read"),
        (["thresholds=0.5", "modes=[dense]"], "thresholds=0.5 .* modes exact and threshold"),
        (["risk=token"], "risk=token .* mode certified"),
        (["transformers_limit=3", "modes=[dense,exact]"], "transformers_limit=3 .* transformers"),
        (["chat=never", "system=Hello"], "system=Hello .* chat=never"),
        (["samples=[4]", "modes=[dense]"], "modes=.* rules for the reasoning do not"),
        (["samples=[4]", "max_running=4"], "max_running=4 .* rules for the reasoning do not"),
        (["reasoning=[none]", "budget.tier=L1"], "budget=.* rules for the reasoning do not"),
        (["reasoning=[none]", "device=cuda"], "device=cuda .* rules for the reasoning do not"),
    ],
)
def test_settings_that_a_run_would_not_read_are_refused(given, words):
    with pytest.raises(DeliberateError, match=words) as raised:
        evaluation_config(given)
    assert "\n" not in str(raised.value)


def test_settings_that_a_run_reads_pass():
    evaluation_config(["samples=[4]", "temperature=0.2", "device=cpu", "resume=false"])
    evaluation_config(["fidelity=[certified]", "risk=token", "epsilon=0.1"])
    evaluation_config(["modes=[exact]", "thresholds=0.5"])


def test_several_fidelities_are_refused():
    cfg = evaluation_config(["reasoning=[none]", "fidelity=[dense,exact]", "task.size=2"])
    with pytest.raises(DeliberateError, match="give one of dense, exact, threshold"):
        evaluate(cfg)
