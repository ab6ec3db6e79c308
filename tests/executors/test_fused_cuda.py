"""The CUDA executor by references and under the interpreter: the generic one's tokens, its graphs
replayed as functions, and segments run ahead of an exit's answer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import kernel_cases as kernels
import pytest
import torch
from fused_cases import close, family, stepwise
from tiny_models import random_ids, tiny_model
from torch import Tensor

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.executors.fused.cuda.graphs import Captures, HostDevice, SegmentGraphs
from deliberate.executors.fused.cuda.prefetch import Launch, Prefetcher
from deliberate.executors.fused.cuda.workspaces import bucket
from deliberate.executors.quantization import Storage, store, widened
from deliberate.kernels.registry import KERNELS
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitReader
from deliberate.modeling.measures import MEASURES
from deliberate.utils.errors import DeliberateError

# Where the Triton kernels run; they leave float64 to torch's references.
ON_GPU = kernels.DEVICE == "cuda"
DTYPE = torch.float32 if ON_GPU else torch.float64
cpu_only = pytest.mark.skipif(ON_GPU, reason="written for a CPU; generations run on a GPU too")


class Recorder(HostDevice):
    """A device that notes what it is asked for; copies arrive when they are waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captured: list[Callable[[], None]] = []

    def capture(self, work):
        self.captured.append(work)
        number = len(self.captured) - 1
        for _ in range(2):
            work()  # as warming up does

        def replay() -> None:
            self.log.append(f"replay {number}")
            work()

        return replay

    def post(self, source, target):
        taken = source.clone()
        self.log.append("post")

        def wait() -> None:
            self.log.append("wait")
            target.copy_(taken)

        return wait


def by_ops(model, **settings) -> CudaFusedBackbone:
    return CudaFusedBackbone(model, ops=True, **settings)


def adaptive(base, exits, **settings) -> AdaptiveModel:
    """A model whose passes and exits go by the ops."""
    made = AdaptiveModel(base, exits)
    made.backbone = by_ops(base, boundaries=made.exit_config.layers, **settings)
    return made


# -- the same numbers ------------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama tied, with biases",
        "llama, one key head each",
        "llama, yarn",
        "llama, dynamic",
        "mistral",
        "qwen2",
        "qwen2, windows",
        "qwen3",
    ],
)
def test_logits_and_keys_equal_the_generic_executor(name):
    model, ids = family(name), random_ids(20)
    theirs, their_cache = stepwise(Backbone(model), ids)
    ours, our_cache = stepwise(by_ops(model, boundaries=(1, 3)), ids)
    assert close(ours, theirs)
    for layer in range(4):
        for mine, other in zip(our_cache.states(layer), their_cache.states(layer), strict=True):
            assert close(mine, other)


@cpu_only
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_ragged_rows_equal_the_generic_executor(name):
    model, ids = family(name), random_ids(24, batch=3)
    made = []
    for backbone in (Backbone(model), by_ops(model)):
        with torch.inference_mode():
            cache = backbone.new_cache(8, 3)
            ctx = backbone.context(0, 14, device="cpu")
            backbone.run_layers(backbone.embed(ids[:, :14], ctx), 0, 4, ctx, cache)
            for row, held in enumerate((14, 9, 4)):
                cache.crop(held, row)
            rows, starts, counts = (0, 2), (14, 4), (2, 5)
            ctx = backbone.pass_context(rows, starts, counts, batch=3)
            hidden = backbone.embed(ids[[0, 2], 14:19], ctx)
            first = backbone.run_layers(hidden, 0, 4, ctx, cache)
            cache.keep((1, 2))
            ctx = backbone.pass_context((0, 1), (9, 9), (1, 1), batch=2)
            second = backbone.run_layers(backbone.embed(ids[:2, 20:21], ctx), 0, 4, ctx, cache)
            state = torch.randn(1, 1, 32, dtype=torch.float64, generator=_generator())
            ctx = backbone.pass_context((1,), (10,), (1,), batch=2)
            backbone.run_layers(backbone.embed(ids[:1, 21:22], ctx), 0, 2, ctx, cache)
            backbone.fill_layers(state, 2, 4, ctx, cache)
            lengths = [cache.row_lengths(row) for row in range(2)]
            held = cache.states(3, 1)
        made.append((first[0, :2], first[1], second, *held, lengths))
    for mine, other in zip(made[1][:-1], made[0][:-1], strict=True):
        assert close(mine, other)
    assert made[1][-1] == made[0][-1] == [[10] * 4, [11] * 4]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


GENERATIONS = [
    ("dense", "defer"),
    ("exact", "defer"),
    ("threshold", "defer"),
    ("threshold", "propagate"),
    ("threshold", "skip"),
]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_generations_equal_those_of_the_generic_executor(name):
    """Single and ragged batches, every fidelity; with and without running ahead.

    On a GPU: compiled kernels, captured graphs.
    """
    ids = random_ids(9, batch=3).to(kernels.DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    base = family(name, dtype=DTYPE).to(kernels.DEVICE)
    plain = AdaptiveModel(base, [1, 2])
    ours = [adaptive(base, [1, 2], prefetch=multi_step) for multi_step in (False, True)]
    for fidelity, kv_mode in GENERATIONS:
        settings = {
            "max_new_tokens": 12,
            "fidelity": fidelity,
            "thresholds": 0.4,
            "kv_mode": kv_mode,
        }
        for prompts, given in ((ids[:1], {}), (ids, {"attention_mask": mask})):
            expected = plain.generate(prompts, **given, **settings)
            for model in ours:
                made = model.generate(prompts, **given, **settings)
                assert torch.equal(made, expected), (fidelity, kv_mode, len(prompts))
    first, second = (model.backbone for model in ours)
    assert first.captures.reason is None and second.captures.reason is None
    assert second.launches.taken > 0 and first.launches.taken == 0
    assert len(first._pool._kept[1]) <= 2


@cpu_only
@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("name", "kv_mode"), [("qwen2", "defer"), ("qwen3", "propagate")])
def test_the_triton_kernels_choose_the_same_tokens(name, kv_mode):
    base = family(name, dtype=torch.float32, layers=2)
    settings = {"max_new_tokens": 4, "fidelity": "threshold", "thresholds": 0.2, "kv_mode": kv_mode}
    ids = random_ids(3, batch=2)
    expected = AdaptiveModel(base, [1]).generate(ids, **settings)
    with kernels.running("triton"):
        made = adaptive(base, [1], prefetch=True).generate(ids, **settings)
    assert torch.equal(made, expected)


@cpu_only
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_smaller_weights_go_through_the_ops(weights):
    model, ids = tiny_model("qwen2", dtype=torch.float32), random_ids(20)
    with KERNELS.override({"int8_linear": "torch"}):  # not rounding what goes in
        ours, _ = stepwise(by_ops(model, weights=weights), ids)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                stored = store(module.weight, Storage(weights))
                module.weight.copy_(widened(stored, torch.float32))
    native, _ = stepwise(by_ops(model), ids)
    theirs, _ = stepwise(by_ops(rounded), ids)
    assert close(ours, theirs, 1e-4) and not close(ours, native, 1e-4)


@cpu_only
def test_the_ops_that_run_are_the_registrys_choice():
    """A backend registered for this request runs inside the executor."""
    seen = []
    model, ids = family("llama"), random_ids(20)
    expected, _ = stepwise(by_ops(model), ids)
    torch_mlp = KERNELS.chosen("skip_mlp", _request()).run

    @KERNELS.register("skip_mlp", "mine", lambda request: request.shape["rows"] == 1)
    def mine(residual, normed, gate_up, down, rows, count):
        seen.append(int(count))
        torch_mlp(residual, normed, gate_up, down, rows, count)

    try:
        made, _ = stepwise(by_ops(model), ids)
    finally:
        KERNELS.remove("skip_mlp", "mine")
    assert torch.equal(made, expected)
    assert seen == [1] * (3 * 4)  # three single tokens through four layers


def _request():
    from deliberate.kernels.registry import KernelRequest

    return KernelRequest("cpu", torch.float64, {"rows": 1, "width": 32, "inner": 64})


# -- exits and the top -----------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("translator", ["low_rank", "full", "none"])
@pytest.mark.parametrize("measure", list(MEASURES))
def test_exits_read_the_same_without_logits(measure, translator, folded):
    exits = ExitConfig.build(4, [1, 2], measure=measure, translator=translator, rank=3)
    model = adaptive(tiny_model("llama"), exits)
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=_generator()))
    backbone, settings = model.backbone, {"model_bytes": 10**9 if folded else 0}
    plain = ExitReader(
        model.exits,
        backbone.norm,
        backbone.lm_head,
        Backbone(model.base).head_logits,
        backbone.softcap,
        **settings,
    )
    reader = backbone.exit_reader(model.exits, **settings)
    states = torch.randn(3, 32, dtype=torch.float64, generator=_generator())
    # The least sure first: those that leave are not the first rows.
    states = states[torch.tensor(plain.evaluate(0, states, 2.0).confidences).argsort()]
    for index in range(2):
        middle = sorted(plain.evaluate(index, states, 0.5).confidences)[1]
        for threshold in (middle - 1e-3, 0.0, 2.0):
            theirs, ours = (one.evaluate(index, states, threshold) for one in (plain, reader))
            assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-5, abs=1e-7)
            on = [row for row in range(3) if theirs.confidences[row] < threshold]
            buffers, _ = reader._buffers_for(index, 3)
            assert buffers.going.tolist() == on + [-1] * (4 - len(on))
            assert int(buffers.remaining) == len(on)
            for row in range(3):
                assert ours.token(row) == theirs.token(row)
            assert close(ours.logits(1), theirs.logits(1))


@cpu_only
def test_the_top_is_read_without_logits(monkeypatch):
    model = tiny_model("qwen3")
    backbone = by_ops(model)
    states = torch.randn(5, 32, dtype=torch.float64, generator=_generator())
    expected = Backbone(model).logits(states)
    requested = []
    logits = backbone.logits
    monkeypatch.setattr(backbone, "logits", lambda x: requested.append(len(x)) or logits(x))
    reading = backbone.read_full_depth(states)
    some = reading.take([3, 1])
    assert (
        reading.tokens == expected.argmax(dim=-1).tolist() and some.tokens[0] == reading.tokens[3]
    )
    best = expected.softmax(dim=-1).amax(dim=-1).tolist()
    assert reading.probabilities == pytest.approx(best, rel=1e-5)
    assert some.probabilities == pytest.approx([best[3], best[1]], rel=1e-5)
    assert requested == []
    assert close(some.logits, expected[[3, 1]]) and close(reading.logits, expected)
    assert requested == [2, 5]


# -- graphs ----------------------------------------------------------------------------------------


@cpu_only
def test_one_graph_serves_every_position_row_list_and_generation():
    base, device = family("qwen2"), Recorder()
    model = adaptive(base, [1, 2], device=device)
    ids = random_ids(5, batch=3)
    settings = {"max_new_tokens": 8, "fidelity": "threshold", "thresholds": 0.1}
    expected = AdaptiveModel(base, [1, 2]).generate(ids, **settings)
    for _ in range(2):  # two sets of memory, while the last generation is not collected yet
        assert torch.equal(model.generate(ids, **settings), expected)
    captured = len(device.captured)
    # By pieces of the model and buckets of tokens, not by step.
    assert captured <= 24
    for _ in range(2):
        assert torch.equal(model.generate(ids, **settings), expected)
    assert len(device.captured) == captured
    assert len([entry for entry in device.log if entry.startswith("replay")]) > 2 * captured


@cpu_only
def test_a_workspace_is_lent_again_and_two_users_never_share_one():
    backbone = by_ops(family("llama"))
    first, second = (backbone.new_cache(10, 3) for _ in range(2))
    assert first.workspace is not second.workspace
    assert (first.workspace.rows, first.workspace.capacity) == (4, 256)
    mine = first.workspace
    mine.keys.fill_(float("nan"))
    del first
    third = backbone.new_cache(10, 4)
    assert third.workspace is mine and bool((mine.keys == 0).all())


@cpu_only
def test_a_longer_generation_outgrows_its_memory():
    model, ids = family("llama"), random_ids(300)
    made = []
    for backbone in (Backbone(model), by_ops(model)):
        with torch.inference_mode():
            cache = backbone.new_cache(4)
            for start, end in ((0, 200), (200, 230), (230, 262)):
                ctx = backbone.context(start, end - start, device="cpu")
                hidden = backbone.embed(ids[:, start:end], ctx)
                hidden = backbone.run_layers(hidden, 0, 4, ctx, cache)
            made.append(backbone.logits(hidden))
    assert close(made[1], made[0]) and cache.workspace.capacity == 512


@cpu_only
def test_weights_written_in_place_or_moved_are_taken_up():
    model, ids = family("llama"), random_ids(20)
    backbone = by_ops(model)
    stepwise(backbone, ids)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.mul_(-1)
    assert close(stepwise(backbone, ids)[0], stepwise(Backbone(model), ids)[0])
    model.float()
    made, cache = stepwise(backbone, ids)
    assert made.dtype == cache.states(0)[0].dtype == torch.float32
    assert close(made, stepwise(Backbone(model), ids)[0], 1e-4)


@cpu_only
def test_folded_keys_follow_weights_written_in_place():
    model = family("llama")
    backbone, state = by_ops(model, boundaries=(1,)), torch.ones(1, 1, 32, dtype=torch.float64)
    for _ in range(2):
        caches = []
        for one in (backbone, Backbone(model)):
            with torch.inference_mode():
                caches.append(cache := one.new_cache())
                one.fill_layers(state, 1, 4, one.context(0, 1, device="cpu"), cache)
        assert close(caches[0].states(3)[0], caches[1].states(3)[0])
        with torch.no_grad():
            model.model.layers[3].self_attn.k_proj.weight.mul_(-1)


@cpu_only
def test_a_capture_that_fails_is_named_once_and_everything_runs_eagerly():
    class Broken(HostDevice):
        tries = 0

        def capture(self, work):
            Broken.tries += 1
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, ids = family("llama"), random_ids(20)
    backbone = by_ops(model, device=Broken())
    made, cache = stepwise(backbone, ids)
    assert close(made, stepwise(Backbone(model), ids)[0])
    reason = "capture failed: operation not permitted when stream is capturing"
    assert backbone.captures.reason == reason and Broken.tries == 1
    assert len(cache.workspace.graphs) == 0
    stepwise(backbone, ids)
    assert Broken.tries == 1


@cpu_only
def test_an_error_of_the_work_itself_is_raised():
    def wrong() -> None:
        raise DeliberateError("shapes do not fit")

    graphs = SegmentGraphs(Captures(HostDevice()))
    with pytest.raises(DeliberateError, match="do not fit"):
        graphs.run("wrong", wrong)


@cpu_only
def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


# -- running ahead ---------------------------------------------------------------------------------


@torch.inference_mode()
def ask(backbone, reader, ids: Tensor, position: int, cache, threshold: float):
    """One token through the first segment, and the question there; what is to go on."""
    ctx = backbone.context(position, 1, device="cpu")
    hidden = backbone.embed(ids[:, position : position + 1], ctx)
    hidden = backbone.run_layers(hidden, 0, 2, ctx, cache)
    return hidden, ctx, reader.evaluate(0, hidden[:, -1], threshold)


@cpu_only
def test_the_next_segment_is_launched_behind_the_flag_and_taken_when_wanted():
    device = Recorder()
    model = adaptive(family("llama"), [2], prefetch=True, device=device)
    backbone, reader, ids = model.backbone, model.reader(), random_ids(9)
    plain = Backbone(model.base)
    caches = [plain.new_cache(), backbone.new_cache()]
    for position in range(4):
        begun = len(device.log)
        hidden, ctx, reading = ask(backbone, reader, ids, position, caches[1], 2.0)
        assert reading.confidences[0] < 2.0
        order = device.log[begun:]
        assert order[-3:] == ["post", order[-2], "wait"] and order[-2].startswith("replay")
        replays = len(device.log)
        made = backbone.run_layers(hidden, 2, 4, ctx, caches[1])
        assert len(device.log) == replays  # taken: nothing is run again
        ctx = plain.context(position, 1, device="cpu")
        x = plain.embed(ids[:, position : position + 1], ctx)
        assert close(made, plain.run_layers(x, 0, 4, ctx, caches[0]))
    assert backbone.launches.taken == 4 and backbone.launches.take_discarded() == []
    assert caches[1].lengths == [4] * 4


@cpu_only
def test_a_segment_launched_in_vain_changes_nothing_and_is_counted():
    model = adaptive(family("llama"), [2], prefetch=True)
    backbone, reader, ids = model.backbone, model.reader(), random_ids(9)
    plain = Backbone(model.base)
    cache, other = backbone.new_cache(), plain.new_cache()
    states = []
    for position in range(3):
        # Launched for a token that the device lets go on; the host decides otherwise.
        hidden, _, _ = ask(backbone, reader, ids, position, cache, 2.0)
        states.append(hidden)
        assert cache.lengths == [position + 1] * 2 + [0] * 2
    ctx = backbone.context(0, 3, device="cpu")
    made = backbone.run_layers(torch.cat(states, dim=1), 2, 4, ctx, cache)
    ctx = plain.context(0, 3, device="cpu")
    assert close(made, plain.run_layers(plain.embed(ids[:, :3], ctx), 0, 4, ctx, other))
    discarded = backbone.launches.take_discarded()
    assert [(one.first, one.last, one.rows, one.starts) for one in discarded] == [
        (2, 4, (0,), (0,)),
        (2, 4, (0,), (1,)),
        (2, 4, (0,), (2,)),
    ]
    assert backbone.launches.take_discarded() == []


@cpu_only
def test_a_token_that_the_device_lets_leave_is_not_run_and_may_still_go_on():
    model = adaptive(family("llama"), [2], prefetch=True)
    backbone, reader, ids = model.backbone, model.reader(), random_ids(9)
    cache, plain = backbone.new_cache(), Backbone(model.base)
    hidden, ctx, _ = ask(backbone, reader, ids, 0, cache, 0.0)
    step = cache.workspace.step(1)
    assert int(step.listed.count) == 0 and bool((cache.workspace.keys[2:] == 0).all())
    made = backbone.run_layers(hidden, 2, 4, ctx, cache)  # the host's word counts
    ctx = plain.context(0, 1, device="cpu")
    x = plain.embed(ids[:, :1], ctx)
    assert close(made, plain.run_layers(x, 0, 4, ctx, plain.new_cache()))
    assert len(backbone.launches.take_discarded()) == 1


def launch(rows=(0, 1), starts=(7, 9), version=3) -> Launch:
    return Launch(0, 2, 4, rows, starts, version)


@cpu_only
@pytest.mark.parametrize(
    ("change", "layer"),
    [
        ({}, 4),
        ({"rows": (1,), "starts": (9,), "counts": (1,)}, 4),  # some of the rows
        ({"last": 6}, 4),  # on to a deeper stop
        ({"last": 3}, None),
        ({"first": 0}, None),
        ({"starts": (7, 10)}, None),
        ({"counts": (1, 2)}, None),  # tokens that waited ride along
        ({"version": 4}, None),  # rows were renumbered
        ({"rows": (0, 2), "starts": (7, 9)}, None),
    ],
)
def test_only_the_pass_that_was_guessed_is_taken(change, layer):
    multi_step = Prefetcher(True)
    multi_step.begin(launch())
    multi_step.answered((0, 1))
    requested = {"rows": (0, 1), "starts": (7, 9), "counts": (1, 1), "first": 2, "last": 4}
    assert multi_step.take(**(requested | {"version": 3} | change)) == layer
    assert len(multi_step.take_discarded()) == (layer is None)
    assert multi_step.open is None and multi_step.take(**requested, version=3) is None  # once


@cpu_only
def test_a_row_that_was_not_run_is_not_taken():
    multi_step = Prefetcher(True)
    multi_step.begin(launch())
    multi_step.answered((1,))
    assert multi_step.take((0,), (7,), (1,), 2, 4, 3) is None


@cpu_only
def test_an_exit_where_most_tokens_leave_is_seldom_guessed_at():
    multi_step = Prefetcher(True, least_taken=0.5)
    tries = 0
    for _ in range(400):
        if multi_step.worth(0):
            tries += 1
            multi_step.begin(launch())
            multi_step.give_up()
    assert 5 < tries < 30
    assert multi_step.worth(1)  # each exit has its own share
    for _ in range(300):  # and it recovers
        if multi_step.worth(0):
            multi_step.begin(launch())
            multi_step.answered((0, 1))
            assert multi_step.take((0, 1), (7, 9), (1, 1), 2, 4, 3) == 4
    assert multi_step.worth(0)


@cpu_only
def test_a_share_outside_its_range_is_a_one_line_error():
    with pytest.raises(DeliberateError, match=r"least_taken 1.5 is outside \[0, 1\]"):
        Prefetcher(True, least_taken=1.5)


# -- several steps on the device -------------------------------------------------------------------


def decode(backbone, reader, cache, exit_index, last, **how):
    given = {"steps": 6, "requested": 6, "threshold": -1.0, "stops": (), "accept_stops": True}
    multi_step = backbone.multi_step(reader)
    return multi_step.decode(exit_index, last, 3, 0, cache, **(given | how))


@torch.inference_mode()
def by_hand(model, steps: int, last: int) -> tuple[list[int], list[float], Tensor]:
    """Tokens, probabilities and states of greedy steps through the layers below `last`."""
    plain = Backbone(model)
    cache, token = plain.new_cache(), 3
    tokens, scores, states = [], [], []
    for position in range(steps):
        ctx = plain.context(position, 1, device="cpu")
        hidden = plain.embed(torch.tensor([[token]]), ctx)
        hidden = plain.run_layers(hidden, 0, last, ctx, cache)
        share = plain.logits(hidden)[0, 0].softmax(dim=-1)
        token = int(share.argmax())
        tokens.append(token)
        scores.append(float(share.max()))
        states.append(hidden[0, 0])
    return tokens, scores, torch.stack(states)


@cpu_only
@pytest.mark.parametrize("device", [HostDevice, Recorder])
def test_steps_feed_their_own_tokens(device):
    model = adaptive(family("qwen3"), [2], device=device())
    backbone, reader = model.backbone, model.reader()
    for exit_index, last in ((None, 4), (0, 2)):
        tokens, scores, states = by_hand(model.base, 7, last)
        cache = backbone.new_cache()
        made = decode(backbone, reader, cache, exit_index, last, steps=7, requested=6)
        assert made.tokens == tokens[:6] and made.accepted == 6
        assert made.scores == pytest.approx(scores[:6], rel=1e-5)
        assert close(made.states, states)  # the seventh was fed and not asked
        assert cache.lengths == [7] * last + [0] * (4 - last)
        assert backbone.launches.take_discarded() == []


@cpu_only
@pytest.mark.parametrize("accept_stops", [True, False])
def test_steps_end_at_a_stop_and_count_what_was_launched_behind_it(accept_stops):
    model = adaptive(family("qwen3"), [2])
    backbone = model.backbone
    tokens, _, _ = by_hand(model.base, 6, 4)
    at = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    cache = backbone.new_cache()
    how = {"threshold": -float("inf"), "stops": (tokens[at],), "accept_stops": accept_stops}
    made = decode(backbone, None, cache, None, 4, **how)
    assert made.tokens == tokens[: at + 1] and made.accepted == at + accept_stops
    assert cache.lengths == [at + 1] * 4
    discarded = backbone.launches.take_discarded()
    assert [(one.first, one.last, one.starts) for one in discarded] == [(0, 4, (at + 1,))]


@cpu_only
def test_steps_end_at_the_first_token_below_the_threshold():
    model = adaptive(family("qwen3"), [2])
    backbone, reader = model.backbone, model.reader()
    _, scores, _ = by_hand(model.base, 6, 2)
    worst = min(range(6), key=scores.__getitem__)
    cache = backbone.new_cache()
    made = decode(backbone, reader, cache, 0, 2, threshold=scores[worst] + 1e-6)
    ends = next(i for i in range(6) if scores[i] < scores[worst] + 1e-6)
    assert (len(made.tokens), made.accepted, len(made.states)) == (ends + 1, ends, ends + 1)
    assert cache.lengths == [ends + 1] * 2 + [0] * 2


@cpu_only
def test_a_step_is_launched_while_the_answer_of_the_one_before_travels():
    device = Recorder()
    model = adaptive(family("qwen3"), [2], device=device, prefetch=True)
    backbone, reader = model.backbone, model.reader()

    def log(exit_index: int | None, **how) -> list[str]:
        begun = len(device.log)
        decode(backbone, reader, backbone.new_cache(), exit_index, 4, **how)
        return [entry.split()[0] for entry in device.log[begun:]]

    one = ["replay", "post"]
    behind = [*one, *one, "wait", *one, "wait", "wait"]
    assert log(None, steps=3, requested=3, threshold=-float("inf")) == behind
    # Drafts wait for each other's answers until most of them stand.
    assert log(0, steps=3, requested=3) == [*one, "wait"] * 3
    for _ in range(8):
        log(0)
    assert log(0, steps=3, requested=3) == behind
    log(0, threshold=2.0)
    log(0, threshold=2.0)
    assert log(0, steps=3, requested=3) == [*one, "wait"] * 3


@cpu_only
def test_layers_run_in_vain_are_in_the_trace():
    """The same tokens; what the executor ran for nothing is counted beside what it needed."""
    base, ids = family("llama"), random_ids(9)
    settings = {
        "max_new_tokens": 14,
        "fidelity": "threshold",
        "thresholds": 0.3,
        "kv_mode": "propagate",
        "return_dict_in_generate": True,
    }
    traces, discarded = [], []
    for multi_step in (False, True):
        model = adaptive(base, [2], prefetch=multi_step)
        launches = model.backbone.launches
        launches._least_taken = 0.0
        kept = launches.take_discarded
        launches.take_discarded = lambda kept=kept: discarded.extend(found := kept()) or found
        traces.append(model.generate(ids, **settings).trace)
    assert traces[0].tokens == traces[1].tokens
    more = [b - a for a, b in zip(traces[0].layer_calls, traces[1].layer_calls, strict=True)]
    assert discarded and more == [0, 0, len(discarded), len(discarded)]
