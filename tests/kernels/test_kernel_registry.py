"""Which implementation runs: predicates, overrides by block and by environment, and strangers."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels import ALL_OPS
from deliberate.kernels.backends import kernel_backends
from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm
from deliberate.kernels.ops.int8_linear import int8_linear, quantise
from deliberate.kernels.registry import (
    KERNELS,
    VARIABLE,
    KernelRequest,
    Registry,
    parse_choice,
)
from deliberate.kernels.triton_support import prefers_triton
from deliberate.utils.errors import DeliberateError


def answering(name: str) -> Callable[[], str]:
    return lambda: name


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Two ops: f with three backends, g with one."""
    monkeypatch.delenv(VARIABLE, raising=False)
    made = Registry()
    made.register("f", "slow")(answering("slow"))
    made.register("f", "narrow", lambda r: r.shape["width"] <= 64)(answering("narrow"))
    made.register("f", "gpu", lambda r: r.device == "cuda")(answering("gpu"))
    made.register("g", "slow")(answering("slow"))
    return made


def ask(registry: Registry, op: str = "f", device: str = "cpu", width: int = 100) -> str:
    return registry.select(op, KernelRequest(device, torch.float32, {"width": width}))()


def test_the_newest_whose_predicate_holds_is_chosen(registry: Registry) -> None:
    assert ask(registry) == "slow"
    assert ask(registry, width=64) == "narrow"
    assert ask(registry, width=64, device="cuda") == "gpu"


def test_an_override_wins_over_predicates_and_ends_with_its_block(registry: Registry) -> None:
    with registry.override({"f": "gpu"}):
        assert ask(registry) == "gpu"
        assert ask(registry, "g") == "slow"
        with registry.override("narrow"):
            assert ask(registry) == "narrow"
            assert ask(registry, "g") == "slow"  # g has no such backend: it chooses as usual
        assert ask(registry) == "gpu"
    assert ask(registry) == "slow"


def test_an_override_ends_when_the_block_fails(registry: Registry) -> None:
    with pytest.raises(KeyError), registry.override("gpu"):
        raise KeyError
    assert ask(registry) == "slow"


def test_the_environment_names_backends_and_a_block_wins_over_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "gpu")
    assert ask(registry) == "gpu"
    monkeypatch.setenv(VARIABLE, "g=slow, f=narrow")
    assert ask(registry) == "narrow"
    with registry.override("slow"):
        assert ask(registry) == "slow"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f=", "not of the form"),
        ("f=slow,f=gpu", "not of the form"),
        ("f=slow,,", "not of the form"),
        ("f=fast", "no backend 'fast'; there are: gpu, narrow, slow"),
        ("h=slow", "no op is called 'h'; there are: f, g"),
        ("fast", "no backend 'fast'"),
    ],
)
def test_an_environment_that_names_nothing_is_a_one_line_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(DeliberateError, match=message) as caught:
        ask(registry)
    assert "\n" not in str(caught.value)


def test_an_override_of_an_unknown_backend_is_refused_at_once(registry: Registry) -> None:
    with pytest.raises(DeliberateError, match="no backend 'fast'"), registry.override("fast"):
        pass
    with pytest.raises(DeliberateError, match="'h'"), registry.override({"h": "slow"}):
        pass


def test_a_backend_registered_again_replaces_the_old_one(registry: Registry) -> None:
    registry.register("f", "slow")(answering("other"))
    assert ask(registry) == "other"
    assert [one.backend for one in registry.listing() if one.op == "f"] == ["slow", "gpu", "narrow"]


def test_a_request_that_nothing_takes_is_a_one_line_error(registry: Registry) -> None:
    registry.remove("g", "slow")
    registry.register("g", "gpu", lambda r: r.device == "cuda")(answering("gpu"))
    with pytest.raises(DeliberateError, match="no implementation of g"):
        ask(registry, "g")


def test_an_op_is_known_before_its_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    made = Registry({"json": "json"})
    with pytest.raises(DeliberateError, match="there are: json"):
        made.select("yaml", KernelRequest("cpu", torch.float32))
    with pytest.raises(DeliberateError, match="no op is called 'json'"):
        made.select("json", KernelRequest("cpu", torch.float32))  # imported, and registers nothing
    assert KERNELS.chosen("kv_fill", KernelRequest("cpu", torch.float32)).backend == "torch"


def test_choices_are_read_per_op_or_for_all() -> None:
    assert parse_choice("torch") == {"*": "torch"}
    assert parse_choice("a=x, b=y") == {"a": "x", "b": "y"}


def test_every_op_has_a_reference_that_serves_everywhere_and_a_gpu_kernel() -> None:
    by_op: dict[str, list[str]] = {}
    for one in KERNELS.listing():
        by_op.setdefault(one.op, []).append(one.backend)
    assert sorted(by_op) == sorted(ALL_OPS)
    for op, known in by_op.items():
        assert known[-1] == "torch", op
        assert "triton" in known, op
        last = next(i for i in KERNELS.listing() if i.op == op and i.backend == "torch")
        assert last.predicate(KernelRequest("meta", torch.float64))


@pytest.mark.parametrize("op", ALL_OPS)
def test_an_op_its_reference_and_its_kernels_have_the_same_parameters(op: str) -> None:
    wanted = list(KERNELS.signature(op).parameters.values())
    operator = getattr(torch.ops.deliberate, op).default._schema
    assert [one.name for one in operator.arguments] == [one.name for one in wanted]
    assert [one.has_default_value() for one in operator.arguments] == [
        one.default is not one.empty for one in wanted
    ]
    for known in (one for one in KERNELS.listing() if one.op == op):
        found = list(inspect.signature(known.run).parameters.values())
        assert [(one.name, one.annotation) for one in found[: len(wanted)]] == [
            (one.name, one.annotation) for one in wanted
        ], known.backend
        assert all(one.default is not one.empty for one in found[len(wanted) :]), known.backend


def test_an_op_is_made_of_one_function(registry: Registry) -> None:
    def outputs(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @registry.define(outputs=outputs)
    def scaled_for_test(x: Tensor, factor: float = 2.0) -> KernelRequest:
        """x * factor."""
        if x.dim() != 1:
            raise DeliberateError(f"scaled_for_test: x [N] is needed, got {tuple(x.shape)}")
        return KernelRequest.of(x, width=x.shape[0])

    @registry.register("scaled_for_test", "torch")
    def reference(x: Tensor, factor: float) -> Tensor:
        return x * factor

    x = torch.arange(3.0)
    assert scaled_for_test(x).tolist() == [0.0, 2.0, 4.0]
    assert scaled_for_test(x, factor=3.0).tolist() == scaled_for_test(x, 3.0).tolist() == [0, 3, 6]
    with pytest.raises(DeliberateError, match=r"x \[N\] is needed"):
        scaled_for_test(x[None])
    torch.library.opcheck(scaled_for_test, (x,))


@pytest.mark.parametrize(
    "other",
    [
        lambda residual, normed: None,
        lambda normed, residual, gate_up, down, rows, count: None,
        lambda residual, normed, gate_up, down, rows, count, needed: None,
    ],
)
def test_a_kernel_with_other_parameters_is_refused(other: Callable[..., None]) -> None:
    with pytest.raises(DeliberateError, match=r"parameters are \(residual, normed, gate"):
        KERNELS.register("skip_mlp", "mine")(other)
    assert "mine" not in {one.backend for one in KERNELS.listing()}


def test_the_environment_names_the_choice_for_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    named = kernel_backends()
    assert sorted(named) == sorted(ALL_OPS)
    here = "triton" if cases.DEVICE == "cuda" else "torch"
    assert named["skip_mlp"] == f"{here} (of triton, torch)"
    monkeypatch.setenv(VARIABLE, "skip_mlp=triton")
    assert kernel_backends()["skip_mlp"].startswith("triton (of")
    monkeypatch.setenv(VARIABLE, "fast")
    assert list(kernel_backends()) == ["error"]


@pytest.mark.skipif(not cases.HAS_TRITON, reason="Triton is not installed")
def test_triton_is_preferred_on_a_gpu_and_never_on_a_cpu() -> None:
    assert prefers_triton(KernelRequest("cuda", torch.bfloat16))
    assert not prefers_triton(KernelRequest("cpu", torch.bfloat16))
    assert not prefers_triton(KernelRequest("cuda", torch.float64))


def test_the_op_runs_what_a_user_registered() -> None:
    seen: list[torch.Size] = []

    def mine(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.shape)
        return x.new_full((x.shape[0], weight.shape[0]), 7.0)

    weight, scale = quantise(torch.eye(3))
    KERNELS.register("int8_linear", "mine", lambda request: request.shape["width"] == 3)(mine)
    try:
        assert int8_linear(torch.ones(2, 3), weight, scale).tolist() == [[7.0] * 3] * 2
        with KERNELS.override({"int8_linear": "torch"}):
            assert int8_linear(torch.ones(1, 3), weight, scale).tolist() == [[1.0] * 3]
    finally:
        KERNELS.remove("int8_linear", "mine")
    assert seen == [torch.Size([2, 3])]


@pytest.mark.skipif(cases.DEVICE == "cuda", reason="float64 is refused on both")
def test_what_triton_cannot_take_is_a_one_line_error() -> None:
    x = torch.ones(1, 4, dtype=torch.float64)
    with (
        KERNELS.override({"add_rmsnorm": "triton"}),
        pytest.raises(DeliberateError, match=r"Triton is not installed|float32, bfloat16"),
    ):
        add_rmsnorm(x, None, x[0], 1e-6, x.clone())
