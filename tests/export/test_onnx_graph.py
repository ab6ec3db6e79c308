"""One ONNX graph of all exits and the top: ONNX Runtime computes what the model computes."""

from __future__ import annotations

import pytest
import torch
from random_checkpoint import save_checkpoint

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
    [("model.bin", "must end in .onnx"), ("there.onnx", "exists: name a new file")],
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
