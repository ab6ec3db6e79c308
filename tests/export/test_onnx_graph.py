"""One ONNX graph of all exits and the top: ONNX Runtime computes what the model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_checkpoint import save_checkpoint
from tiny_models import tiny_model

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.export import onnx_graph
from deliberate.export.onnx_graph import export_onnx
from deliberate.utils.errors import DeliberateError

runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    return export_onnx(str(folder), tmp_path_factory.mktemp("graph") / "new" / "small.onnx")


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 2), (1, 33), (4, 9)])
def test_the_runtime_has_the_logits_of_every_exit_and_of_the_top(folder, exported, shape):
    assert exported.outputs == ("exit_1", "exit_2", "logits")
    model = AdaptiveModel.from_pretrained(str(folder), executor="generic")
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, model.backbone.vocab_size, shape, generator=generator)
    session = runtime.InferenceSession(str(exported.path))
    found = session.run(list(exported.outputs), {"input_ids": ids.numpy()})
    states = model(input_ids=ids, output_exit_states=True)
    backbone = model.backbone
    expected = [
        backbone.head_logits(model.exits.translate(index, backbone.norm(state)))
        for index, state in enumerate(states.exits)
    ]
    expected.append(model.base(input_ids=ids).logits)
    for mine, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), mine, atol=1e-4, rtol=1e-4)


def _decoded(session, ids, made, steps):
    """Logits of all outputs at the last prompt token and each later one, by greedy steps."""
    held = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        for one in session.get_inputs()[1:]
    }
    assert tuple(held) == made.past
    fed, tokens, logits = ids.numpy(), [], []
    for _ in range(steps):
        found = session.run([*made.outputs, *made.present], {"input_ids": fed, **held})
        logits.append([one[0, -1] for one in found[: len(made.outputs)]])
        held = dict(zip(made.past, found[len(made.outputs) :], strict=True))
        fed = found[len(made.outputs) - 1][:, -1:].argmax(-1)
        tokens.append(int(fed[0, 0]))
    assert {one.shape[2] for one in held.values()} == {ids.shape[1] + steps - 1}
    return tokens, logits


def _small_folder(kind, tmp_path):
    if kind == "llama with exits":
        return str(save_checkpoint(tmp_path / "model"))
    tiny_model(kind, layers=2, dtype=torch.float32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama with exits", "qwen2", "mistral", "tiny"])
def test_the_runtime_decodes_token_by_token_what_full_depth_does(kind, tmp_path):
    name = kind if kind == "tiny" else _small_folder(kind, tmp_path)
    made = export_onnx(name, tmp_path / "past.onnx", past=True)
    assert made.past[:2] == ("past_key_values.0.key", "past_key_values.0.value")
    assert made.present[-1] == f"present.{len(made.past) // 2 - 1}.value"
    model = AdaptiveModel.from_pretrained(name, executor="generic")
    if kind == "tiny":
        text = "Question: Tom has 3 apples and buys 4 more. How many has he?\nAnswer:"
        ids = checkpoint.load_tokenizer(name)(text, return_tensors="pt").input_ids
    else:
        ids = torch.randint(0, model.backbone.vocab_size, (1, 9))
    steps = 16
    tokens, logits = _decoded(runtime.InferenceSession(str(made.path)), ids, made, steps)
    whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
    expected = model.base.generate(
        ids, do_sample=False, max_new_tokens=steps, eos_token_id=None, pad_token_id=0
    )
    assert whole.tolist() == expected.tolist()
    states = model(input_ids=whole[:, :-1], output_exit_states=True)
    backbone, first = model.backbone, ids.shape[1] - 1
    for index, state in enumerate(states.exits):
        ours = backbone.head_logits(model.exits.translate(index, backbone.norm(state)))[0, first:]
        theirs = torch.tensor(np.stack([one[index] for one in logits]))
        assert theirs.argmax(-1).tolist() == ours.argmax(-1).tolist()
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)


def test_a_model_that_torch_export_refuses_is_named_in_one_line(folder, tmp_path, monkeypatch):
    def refusing(*_args, **_kwargs):
        try:
            raise KeyError("some_layer")
        except KeyError as cause:
            raise torch.onnx.errors.OnnxExporterError("Failed to export.\nAdvice.") from cause

    monkeypatch.setattr(torch.onnx, "export", refusing)
    with pytest.raises(DeliberateError, match=r"does not carry .*: KeyError: 'some_layer'$"):
        export_onnx(str(folder), tmp_path / "small.onnx", past=True)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_difference", lambda *_: 0.5)
    monkeypatch.setattr(onnx_graph, "_traced", lambda *_: _Program())
    with pytest.raises(DeliberateError, match=r"differ from torch's by 0\.5"):
        export_onnx(str(folder), tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


class _Program:
    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"graph")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.bin", "must end in .onnx"),
        ("there.onnx", "exists: name a new file"),
        ("there.onnx/small.onnx", "there.onnx is a file, a folder is needed"),
    ],
)
def test_a_name_that_cannot_be_written_is_an_error_before_loading(name, message, tmp_path):
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(DeliberateError, match=message):
        export_onnx("no/such-model", tmp_path / name)
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_weights_that_one_file_cannot_hold_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_LARGEST", 1000)
    with pytest.raises(DeliberateError, match="GB of weights: one ONNX file holds at most 2"):
        export_onnx(str(folder), tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())
