"""A student in int8: what is quantised, and that its mean logits stay."""

import logging

import numpy as np
import pytest
import torch

from gdviz.student.export import export_onnx, logits_of, quantise
from gdviz.student.family import build_student

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def test_a_light_student_is_in_int8_and_says_about_the_same(tmp_path, caplog):
    torch.manual_seed(0)
    colours, frames = torch.rand(4, 8, 3, 1, 1, 1), torch.rand(4, 8, 3, 8, 24, 24)
    clips = [*(colours * frames)]
    model = build_student("light-2xs", 12)
    for part in clips:
        model(part)  # for the norms
    export_onnx(model.eval(), clips[0], tmp_path / "a.onnx")
    assert quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", clips) == (6, 6)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # nobody could heed it
    full, small = (logits_of(tmp_path / name, clips) for name in ("a.onnx", "b.onnx"))
    assert full.shape == (32, 12)
    with torch.no_grad():
        np.testing.assert_allclose(full, model(torch.cat(clips))[0], atol=1e-4)
    np.testing.assert_allclose(small.mean(0), full.mean(0), atol=1e-6)
    assert 0 < np.abs(small - full).mean() < 0.2 * full.std(0).mean()


def test_two_dimensional_convolutions_are_quantised_and_others_left(tmp_path):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(4, 4, 3)
            self.fc = torch.nn.Linear(4, 2)

        def forward(self, clips):
            frames = self.flat(clips.transpose(1, 2).flatten(0, 1))
            maps = frames.unflatten(0, (-1, clips.shape[2])).transpose(1, 2)
            return self.fc(self.deep(maps).mean((2, 3, 4))), maps

    torch.manual_seed(0)
    clips = torch.randn(4, 3, 5, 9, 9)
    export_onnx(Both(), clips, tmp_path / "a.onnx")
    assert quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", [clips]) == (1, 2)
    graph = onnx.load(tmp_path / "b.onnx").graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    kinds = [made_by.get(n.input[1], "") for n in graph.node if n.op_type == "Conv"]
    assert sorted(kinds) == ["", "DequantizeLinear"]
    (linear,) = [n for n in graph.node if n.op_type in ("Gemm", "MatMul")]
    assert made_by.get(linear.input[1]) != "DequantizeLinear"
    full, small = (logits_of(tmp_path / name, [clips]).mean(0) for name in ("a.onnx", "b.onnx"))
    np.testing.assert_allclose(small, full, atol=1e-6)
