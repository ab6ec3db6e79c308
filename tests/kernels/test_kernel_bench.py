"""The kernel benchmark counts bytes as written down, orders its runs fairly and keeps records."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import kernel_cases as kernels
import pytest
import torch

from deliberate.kernels import ALL_OPS
from deliberate.kernels.tools import decode_bench, gpu_session
from deliberate.kernels.tools.bench import main, run_cases
from deliberate.kernels.tools.bench_cases import Call, cases, shapes_of
from deliberate.kernels.tools.decode_cases import Line
from deliberate.kernels.tools.gpu_session import Outcome, Step
from deliberate.kernels.tools.roofline import floor_seconds, h200_floors
from deliberate.kernels.tools.timing import Timing, time_on_cpu
from deliberate.utils.errors import DeliberateError


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    head = next(case for case in cases(shapes_of("qwen2.5-0.5b"), 2) if case.op == "exit_head")
    assert head.least_bytes == (151936 * 896 + 896) * 2
    assert floor_seconds(head, 4.8e12, 1e15) == head.least_bytes / 4.8e12
    assert floor_seconds(head, 1e30, 1e3) == head.operations / 1e3


def test_every_op_has_a_floor_on_an_h200() -> None:
    floors = h200_floors(["qwen2.5-0.5b"])
    assert {one["op"] for one in floors} == set(ALL_OPS)
    head = next(one for one in floors if one["op"] == "exit_head")
    assert head["floor_us"] == pytest.approx(56.7, abs=0.1)


def test_the_roofline_is_printed_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--roofline", "--model", "qwen2.5-0.5b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[1] for line in lines[2:]} == {*ALL_OPS, "one token"}
    # 24 layers of 14.9 M weights and a head of 136 M, two bytes each, at 4.8 TB/s.
    whole = next(line for line in lines if "every layer and the head" in line)
    assert float(whole.split(" | ")[4]) == pytest.approx(
        2e6 * (24 * (896 * 64 * 32 + 3 * 896 * 4864) + 151936 * 896) / 4.8e12, abs=0.01
    )


@pytest.mark.parametrize("backend", ["torch"])
def test_every_way_of_every_case_runs(backend: str) -> None:
    device = torch.device(kernels.DEVICE)
    seen = set()
    for case in cases(shapes_of("tiny"), 4):
        if case.operations > 5e8:
            continue
        with kernels.running(backend):
            for call in case.build(device, torch.float32).values():
                call()
        seen.add(case.op)
    assert seen == set(ALL_OPS)


def test_percentiles_are_of_single_runs() -> None:
    timing = Timing.of([1e-6 * value for value in range(1, 12)])
    assert (timing.p20, timing.p50, timing.p80) == pytest.approx((3.0, 6.0, 9.0))
    assert timing.samples == 11


def test_ways_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timed = time_on_cpu([variants], 3, clock=lambda: float(next(ticks)))
    assert "".join(order) == "abcbcacababc"
    assert timed["a"] == Timing(1e6, 1e6, 1e6, 3)


@pytest.mark.skipif(kernels.DEVICE == "cuda", reason="the whole benchmark is a step of make gpu")
def test_the_benchmark_writes_json_and_markdown(tmp_path: Path) -> None:
    out = tmp_path / "kernels"
    given = ["--op", "exit_gate", "--model", "tiny", "--samples", "2", "--out", str(out)]
    assert main(given) == 0
    figures = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert figures["tables"]["tiny"][0]["variant"] == "ours"
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| exit_gate | 8 rows | ours | torch |" in text
    assert "Floors of an H200" in text


def test_unknown_shapes_are_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "huge", "--op", "exit_gate", "--samples", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err


def test_a_step_that_fails_or_runs_over_is_recorded_as_such() -> None:
    python = sys.executable
    ok = gpu_session.run(Step("ok", (python, "-c", "print('fine')"), 300))
    assert (ok.result, ok.tail) == ("ok", "fine")
    failed = gpu_session.run(Step("bad", (python, "-c", "print('x'); raise SystemExit(3)"), 300))
    assert (failed.result, failed.tail) == ("failed (3)", "x")
    late = gpu_session.run(Step("late", (python, "-c", "import time; time.sleep(60)"), 0.5))
    assert late.result == "over time"


def test_the_steps_end_in_under_nine_minutes(tmp_path: Path) -> None:
    assert sum(step.limit for step in gpu_session.steps(tmp_path, [])) < 540


def test_the_session_runs_test_files_that_exist() -> None:
    tests = Path(__file__).resolve().parents[1]
    found = gpu_session.find_tests(gpu_session.TESTS, tests)
    assert str(Path(__file__).resolve()) in found and not any("native" in name for name in found)
    assert set(gpu_session.find_tests(gpu_session.FEW_TESTS, tests)) < set(found)
    with pytest.raises(DeliberateError, match="run from the project's folder"):
        gpu_session.find_tests(gpu_session.FEW_TESTS, tests / "elsewhere")


def test_a_step_without_its_packages_is_skipped_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = Step("bundled", (sys.executable, "-c", "raise SystemExit(9)"), 30, ("no_such_package",))
    assert gpu_session.run(step).result == "skipped"
    printed = capsys.readouterr().out
    assert printed == "== bundled: skipped: needs no_such_package, which this Python lacks\n"


def test_the_decoding_step_needs_no_configuration_framework(tmp_path: Path) -> None:
    """It is the one that must run where nothing can be installed."""
    own = next(s for s in gpu_session.steps(tmp_path, []) if s.name == "decoding benchmark")
    assert {"hydra", "omegaconf"}.isdisjoint(own.needs)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'typer')))\n"
    run = (
        blocked + "from deliberate.kernels.tools.decode_bench import main; main(['--size', 'huge'])"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=300)
    assert done.stderr.strip() == "size 'huge' is unknown: one of 0.5b, tiny"


def test_the_table_of_the_decoding_step_has_every_field_of_its_lines() -> None:
    line = Line("dense", 1.2, 1.1, 1.3, 0.2, 1.25, 24.0, 0.5, 0.975)
    figures = {
        **{"device": "a GPU", "created": "today", "size": "0.5b", "dtype": "bfloat16"},
        **{"tokens": 129, "prompt": 128, "rounds": 5, "bandwidth_gb_s": 4229.0},
        **{"lines": [asdict(line)], "failed": {"dense, 8": "no time was left"}},
    }
    text = decode_bench.markdown(figures)
    row = "| dense | 1.200 | 1.100-1.300 | 0.200 | 17% | 1.250 | +4% | 24.00 | 0.500 | 97.5% |"
    assert row in text
    assert text.endswith("Not measured: dense, 8: no time was left\n")


def test_a_record_keeps_what_there_is(tmp_path: Path) -> None:
    row = {"ms_per_token": {"median": 2.0, "p90": 3.0, "p99": 4.0}}
    suites = {"suites": {"single": {"variants": {"dense": row}}}}
    (tmp_path / "bundled.json").write_text(json.dumps(suites))
    (tmp_path / "decode.json").write_text(json.dumps({"lines": []}))
    (tmp_path / "decode.md").write_text("# Decoding, a GPU\n\n| way |\n")
    outcomes = [Outcome("kernel benchmark", "over time", 170.0, "a | b\nlast | line")]
    figures, text = gpu_session.record(outcomes, tmp_path, "a GPU")
    assert figures["kernels"] is None and figures["decode"] == {"lines": []}
    assert figures["steps"][0]["result"] == "over time"
    assert "| kernel benchmark | over time | 170.0 | last / line |" in text
    assert "| dense | 2.00 | 3.00 |" in text and "\n## Decoding, a GPU\n" in text


def test_a_case_that_fails_is_named_and_the_next_one_is_timed() -> None:
    device, failed = torch.device("cpu"), {}
    chosen = [case for case in cases(shapes_of("tiny"), 4) if case.name == "8 rows"][:3]

    def broken(_device: torch.device, _dtype: torch.dtype) -> dict[str, Call]:
        raise RuntimeError("out of resource: shared memory\nand more")

    chosen[1] = replace(chosen[1], build=broken)
    lines = run_cases(chosen, device, torch.float32, 1e9, 1e12, 2, failed=failed)
    assert {line.op for line in lines} == {chosen[0].op, chosen[2].op}
    assert failed == {f"{chosen[1].op}, 8 rows": "RuntimeError: out of resource: shared memory"}
    failed.clear()
    assert run_cases(chosen, device, torch.float32, 1e9, 1e12, 2, 0.0, failed) == []
    assert set(failed.values()) == {"no time was left"}


@pytest.mark.skipif(kernels.DEVICE == "cuda", reason="there is a GPU")
def test_a_session_without_a_gpu_is_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_session.main([]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
