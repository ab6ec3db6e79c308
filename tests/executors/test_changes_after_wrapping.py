"""What is done to a model after it was wrapped: followed, or refused by name, in every mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model
from torch import nn

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.kernels import native_build
from deliberate.kernels.border import BorderError
from deliberate.utils.errors import DeliberateError

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
MODES = ("dense", "exact", "threshold")
NEW = 14


@pytest.fixture(autouse=True)
def eager_elsewhere(monkeypatch):
    """What is not the C++ kernels' runs eagerly: compilation takes long and is tested elsewhere."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def wrap(executor: str = "fused", *, base=None, **settings) -> AdaptiveModel:
    base = tiny_model("llama", layers=4, dtype=torch.float32) if base is None else base
    return AdaptiveModel(base, [1, 2], executor=executor, **settings)


def answers(model: AdaptiveModel) -> list[list[int]]:
    """Greedy answers in every mode, alone and in a batch."""
    made = []
    for fidelity in MODES:
        how = {"fidelity": fidelity, "thresholds": 0.05, "max_new_tokens": NEW, "online": False}
        made.append(model.generate(random_ids(7), **how)[0].tolist())
        made += model.generate(random_ids(7, batch=3), **how).tolist()
    return made


def swap_data(model: AdaptiveModel) -> None:
    for parameter in model.base.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


MOVES = {
    "model.to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "base.to(bfloat16)": lambda model: model.base.to(torch.bfloat16),
    "base.half()": lambda model: model.base.half(),
    "model.double()": lambda model: model.double(),
    "data swapped": swap_data,
    "head.to(bfloat16)": lambda model: model.base.lm_head.to(torch.bfloat16),
    "embedding.to(bfloat16)": lambda model: model.base.model.embed_tokens.to(torch.bfloat16),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_was_moved_decodes_as_one_wrapped_after_the_move_or_is_refused(move):
    moved = wrap()
    answers(moved)
    MOVES[move](moved)
    try:
        expected = answers(wrap(base=copy.deepcopy(moved.base)))
    except (DeliberateError, RuntimeError):  # it could not be wrapped so, or does not fit itself
        with pytest.raises((DeliberateError, RuntimeError)):
            answers(moved)
        return
    assert answers(moved) == expected


@pytest.mark.parametrize("fidelity", MODES)
@pytest.mark.parametrize("whole", [True, False])
def test_the_engine_that_was_asked_for_is_refused_where_it_can_no_longer_run(fidelity, whole):
    model = wrap(engine="native")
    (model if whole else model.base).to(torch.bfloat16)
    with pytest.raises(DeliberateError, match=r"'native' cannot be had here.*bfloat16"):
        model.generate(random_ids(5), max_new_tokens=4, fidelity=fidelity)


@pytest.mark.parametrize("fidelity", MODES)
@pytest.mark.parametrize("by", ["streamer", "criterion"])
def test_a_move_in_the_middle_of_a_generation_is_no_crash(fidelity, by):
    model = wrap()

    class Mover:
        seen = 0

        def put(self, _ids) -> None:
            self.seen += 1
            if self.seen == 4:
                model.base.to(torch.bfloat16)

        def end(self) -> None:
            pass

        def __call__(self, ids, _scores, **_):
            self.put(ids)
            return torch.zeros(len(ids), dtype=torch.bool)

    mover = Mover()
    how = {"streamer": mover} if by == "streamer" else {"stopping_criteria": [mover]}
    try:
        out = model.generate(
            random_ids(5), max_new_tokens=40, fidelity=fidelity, thresholds=0.05, **how
        )
        assert out.shape == (1, 45)
    except DeliberateError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("executor", ["fused", "generic"])
def test_resized_embeddings_are_followed(executor):
    model = wrap(executor)
    answers(model)
    model.base.resize_token_embeddings(VOCAB + 40)
    with torch.no_grad():  # the new tokens win at once
        model.base.lm_head.weight[VOCAB:] = 3 * model.base.lm_head.weight[:40]
    made = answers(model)
    assert made == answers(wrap("generic", base=copy.deepcopy(model.base)))
    assert max(map(max, made)) >= VOCAB


@pytest.mark.parametrize("fidelity", MODES)
def test_a_head_with_more_rows_than_the_embedding_is_refused_where_it_chooses_one(fidelity):
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    head = nn.Linear(32, VOCAB + 4000, bias=False)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:VOCAB] = base.lm_head.weight
    base.lm_head = head
    model = wrap(base=base)
    assert answers(model) == answers(wrap("generic", base=copy.deepcopy(base)))
    with torch.no_grad():
        head.weight[VOCAB:] = 5 * head.weight[:VOCAB].repeat(42, 1)[:4000]
    with pytest.raises(DeliberateError, match=r"token id \d+ has no embedding: the model has 97"):
        model.generate(random_ids(5), max_new_tokens=20, fidelity=fidelity, thresholds=0.01)


def test_memory_that_was_given_back_is_noticed_before_it_is_read():
    model = wrap()
    model.generate(random_ids(5), max_new_tokens=4)
    backbone = model.backbone
    cache, ctx = backbone.new_cache(), backbone.context(0, 3, device="cpu")
    hidden = backbone.embed(random_ids(3), ctx)
    model.base.model.layers[2].mlp.down_proj.weight.data.untyped_storage().resize_(0)
    with pytest.raises(BorderError, match="moved or freed"):
        backbone.run_layers(hidden, 0, 4, ctx, cache)


# -- other modules ---------------------------------------------------------------------------------


def lora(base):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(base, config).eval()


def test_an_adapter_injected_after_wrapping_is_followed_by_auto():
    model = wrap("auto")
    before = answers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora(model.base)
    assert model.reader() and "q_proj that is not a plain linear layer" in model.executor
    made = answers(model)
    assert made != before and made == answers(wrap("generic", base=copy.deepcopy(model.base)))


@pytest.mark.parametrize("fidelity", MODES)
def test_an_adapter_injected_after_wrapping_is_refused_by_name_where_fused_was_asked_for(fidelity):
    model = wrap("fused")
    before = answers(model)
    adapter = lora(model.base)
    with pytest.raises(DeliberateError, match="q_proj that is not a plain linear layer"):
        model.generate(random_ids(5), max_new_tokens=4, fidelity=fidelity)
    with pytest.raises(DeliberateError, match="merge_and_unload"):
        FusedBackbone.refresh(model.backbone)
    adapter.merge_and_unload()
    made = answers(model)
    assert made != before and made == answers(wrap("generic", base=copy.deepcopy(model.base)))


def test_a_hook_put_on_a_layer_is_refused_by_name_and_those_of_transformers_are_not():
    model = wrap("fused")
    before = answers(model)
    model.base(random_ids(4), output_hidden_states=True)  # installs hooks that stay, idle
    assert answers(model) == before
    handle = model.base.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(DeliberateError, match="layer 1 has a hook"):
        model.generate(random_ids(5), max_new_tokens=4)
    handle.remove()
    assert answers(model) == before


@pytest.mark.parametrize("weights", [None, "int8"])
def test_weights_written_in_place_are_followed(weights):
    model = wrap("fused", weights=weights)
    before = answers(model)
    with torch.no_grad():
        model.base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        model.base.model.norm.weight.add_(0.3)
    made = answers(model)
    fresh = wrap("fused", base=copy.deepcopy(model.base), weights=weights)
    assert made != before and made == answers(fresh)


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["fused", "auto", "generic"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_decodes_alike_and_for_itself(how, executor):
    model = wrap(executor, weights="int8" if executor == "fused" else None)
    before = answers(model)
    model.fidelity = "threshold"
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert copied.executor == model.executor and copied.fidelity == "threshold"
    assert answers(copied) == before
    with torch.no_grad():
        copied.base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert answers(copied) != before and answers(model) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_fused_executor_can_be_copied_by_itself(how):
    backbone = FusedBackbone(tiny_model("qwen3", dtype=torch.float32), boundaries=(2,))
    copied = copy.deepcopy(backbone) if how == "deepcopy" else pickle.loads(pickle.dumps(backbone))
    assert copied.model is not backbone.model and copied.boundaries == backbone.boundaries
    states = torch.randn(2, 32)
    assert torch.equal(copied.logits(states), backbone.logits(states))
