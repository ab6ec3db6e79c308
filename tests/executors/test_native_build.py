"""The C++ kernels are compiled once, loaded where intact, and never in the way."""

from __future__ import annotations

import ctypes
import multiprocessing
import os

import pytest
import torch
from fused_cases import FAMILIES
from tiny_models import tiny_model

from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.implementation import LayerEngine
from deliberate.kernels import native_build
from deliberate.kernels.native_arguments import STRUCTURES

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


def single(name: str, **overrides):
    architecture, settings = FAMILIES[name]
    return tiny_model(architecture, dtype=torch.float32, **(settings | overrides))


def test_float32_models_take_the_kernels_and_others_do_not():
    assert FusedBackbone(single("llama")).engine is LayerEngine.NATIVE
    assert FusedBackbone(tiny_model("llama")).engine is not LayerEngine.NATIVE


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing is compiled yet."""
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path))
    native_build.forget()
    yield tmp_path
    native_build.forget()


def test_turned_off_they_give_way_by_name(anew, monkeypatch):
    monkeypatch.setenv("DELIBERATE_NATIVE", "0")
    assert native_build.unavailable() == "DELIBERATE_NATIVE=0 is set"
    assert FusedBackbone(single("llama")).engine is not LayerEngine.NATIVE


def test_a_compiler_that_fails_is_named_in_one_line_and_leaves_nothing(anew, monkeypatch):
    broken = anew / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x: error: no'; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    reason = native_build.unavailable()
    assert reason is not None and reason.startswith("compilation failed") and "\n" not in reason
    assert not list((anew / "native").iterdir())


def test_a_failed_compilation_is_said_once_and_not_tried_again(small, monkeypatch, caplog):
    tried = []

    def fails(*_):
        tried.append(1)
        raise native_build.NativeBuildError("timed out after 300 seconds")

    monkeypatch.setattr(native_build, "_compile", fails)
    reasons = [native_build.unavailable() for _ in range(3)]
    assert reasons == ["compilation failed: timed out after 300 seconds"] * 3 and len(tried) == 1
    assert caplog.text.count("run slower without them: compilation failed: timed out") == 1
    native_build.forget()
    assert native_build.unavailable() is not None and len(tried) == 2


def test_a_compiler_that_takes_too_long_is_not_run_again_for_an_older_processor(small, monkeypatch):
    monkeypatch.setattr(native_build, "_SECONDS", 1)
    slow, log = small / "slow", small / "log"
    slow.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\necho x >> {log}; exec sleep 9\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    assert "took more than 1 seconds" in str(native_build.unavailable())
    assert log.read_text() == "x\n" and not list((small / "native").iterdir())


def test_an_error_in_one_of_several_sources_is_named(small):
    (small / "cpp" / "wrong.cpp").write_text("int f() { return 0 }\n")
    reason = str(native_build.unavailable())
    assert reason.startswith("compilation failed") and "error" in reason


def test_no_compiler_is_a_reason(anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_build.unavailable() == "no C++ compiler is found (no-such-compiler)"


@pytest.fixture
def small(anew, monkeypatch):
    """Sources that are compiled in no time."""
    sizes = ", ".join(str(ctypes.sizeof(one)) for one in STRUCTURES)
    (anew / "cpp").mkdir()
    (anew / "cpp" / "small.cpp").write_text(
        f'extern "C" void deliberate_sizes(long long* to) {{ long long all[] = {{{sizes}}};\n'
        f"for (int i = 0; i < {len(STRUCTURES)}; i++) to[i] = all[i]; }}\n"
    )
    monkeypatch.setattr(native_build, "SOURCES", anew / "cpp")
    return anew


def test_what_was_compiled_once_is_loaded(small, monkeypatch):
    assert native_build.unavailable() is None
    (made,) = (small / "native").glob("*.so")
    native_build.forget()
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert native_build.unavailable() is None and made.is_file()


def test_a_compilation_says_how_long_it_took_and_where_it_is_kept_and_a_load_says_nothing(
    small, caplog
):
    assert native_build.unavailable() is None
    (made,) = (small / "native").glob("*.so")
    assert caplog.text.count(f"s; kept at {made}") == 1
    native_build.forget()
    assert native_build.unavailable() is None and caplog.text.count("kept at") == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "unsigned"])
def test_a_library_that_is_not_what_was_compiled_is_never_loaded_but_made_anew(small, damage):
    assert native_build.unavailable() is None
    (made,) = (small / "native").glob("*.so")
    whole = made.read_bytes()
    # Another file in its place: this process has the first one mapped.
    made.unlink()
    wrong = {"truncated": whole[: len(whole) // 3], "empty": b"", "foreign": b"\x7fELF" * 99}
    made.write_bytes(wrong.get(damage, whole))
    if damage == "unsigned":
        made.with_suffix(".sha256").unlink()
    native_build.forget()
    assert native_build.unavailable() is None
    assert made.read_bytes() == whole and native_build._intact(made)


def _load_or_exit() -> None:
    os._exit(0 if native_build.unavailable() is None else 1)


def test_of_several_processes_that_find_no_library_one_compiles(small, monkeypatch):
    counting, log = small / "counting", small / "log"
    counting.write_text(
        f"#!/bin/sh\n[ $1 = --version ] || {{ echo x >> {log}; sleep 0.5; }}\n"
        f'exec {native_build.compiler()} "$@"\n'
    )
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    forked = multiprocessing.get_context("fork")
    running = [forked.Process(target=_load_or_exit) for _ in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert [one.exitcode for one in running] == [0] * 4
    # one source, and the library of it
    assert log.read_text() == "x\nx\n" and len(list((small / "native").glob("*.so"))) == 1


def test_a_library_with_other_structures_is_refused(small, monkeypatch):
    monkeypatch.setattr(native_build, "STRUCTURES", STRUCTURES[::-1])
    assert "bytes where" in str(native_build.unavailable())
