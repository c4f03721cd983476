"""A student in int8: what is quantised, and how its weights are rounded."""

import numpy as np
import pytest
import torch

from gdviz.student import export as module
from gdviz.student.export import _mean_logits, export_onnx, quantise, round_together
from gdviz.student.family import build_student

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def nearest(w, scale, moments=None):
    return (w / scale[:, None]).round()


def changed(w, q, scale, moments):
    d = w - q * scale[:, None]
    return float(torch.einsum("oi,ij,oj->", d, moments, d))


def problem(seed, inputs=12, shared=2.0):
    """Weights, their scales, and moments of inputs that share so much."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(5, inputs, generator=rng, dtype=torch.float64)
    x = torch.randn(400, inputs, generator=rng, dtype=torch.float64)
    x = x + shared * torch.randn(400, 1, generator=rng, dtype=torch.float64)
    return w, w.abs().amax(1) / 127, x.T @ x


@pytest.mark.parametrize("seed", range(5))
def test_rounding_makes_up_where_inputs_go_together(seed):
    w, scale, moments = problem(seed)
    q = round_together(w, scale, moments)
    assert torch.equal(q, q.round()) and q.abs().max() <= 127
    assert (w - q * scale[:, None]).abs().max() < 3 * scale.max()
    plain = changed(w, nearest(w, scale), scale, moments)
    assert changed(w, q, scale, moments) < 0.75 * plain


def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest():
    w, scale, moments = problem(0)
    for alone in (torch.diag(moments.diagonal()), torch.zeros_like(moments)):
        assert torch.equal(round_together(w, scale, alone), nearest(w, scale))


def test_it_is_a_tenth_from_the_best_of_all_roundings():
    """Of both neighbours of four weights all combinations are tried; to nearest is .65 from it."""
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).double()
    above = []
    for seed in range(20):
        w, scale, moments = problem(seed, inputs=4)
        found = round_together(w, scale, moments)
        for row, q, s in zip(w[:, None], found[:, None], scale[:, None], strict=True):
            each = [changed(row, (row / s).floor() + up, s, moments) for up in choices]
            above.append(changed(row, q, s, moments) / min(each))
    assert len(above) == 100 and np.mean(above) < 1.2


def test_a_student_s_weights_are_rounded_so(tmp_path):
    torch.manual_seed(0)
    clips = [torch.rand(8, 3, 8, 24, 24).cumsum(2) for _ in range(4)]
    model = build_student("light-2xs", 12)
    for part in clips:
        model(part)  # for the norms
    export_onnx(model.eval(), clips[0], tmp_path / "a.onnx")
    assert quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", clips) == (6, 6)
    whole, small = (onnx.load(tmp_path / name) for name in ("a.onnx", "b.onnx"))
    weights, constants, found = module._arrays(whole), module._arrays(small), []
    for name, moments in module._second_moments(whole, clips).items():
        w, scale, q = (
            torch.tensor(x).double()
            for x in (weights[name], constants[f"{name}_scale"], constants[f"{name}_quantized"])
        )
        parts = w.flatten(1), scale, moments
        plain = changed(parts[0], nearest(*parts), scale, moments)
        found.append(changed(parts[0], q.flatten(1), scale, moments) / plain)
    assert len(found) == 6 and max(found) < 0.9


def test_convolutions_of_groups_are_rounded_as_they_were(tmp_path):
    class Grouped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.apart = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8)
            self.fc = torch.nn.Linear(8, 2)

        def forward(self, clips):
            maps = self.apart(self.whole(clips[:, :, 0]).relu())
            return self.fc(maps.mean((2, 3))), maps

    torch.manual_seed(0)
    clips = torch.randn(4, 3, 2, 9, 9)
    export_onnx(Grouped(), clips, tmp_path / "a.onnx")
    whole = onnx.load(tmp_path / "a.onnx")
    assert [m.shape for m in module._second_moments(whole, [clips]).values()] == [(27, 27)]
    quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", [clips])
    full, small = (
        _mean_logits(onnx.load(tmp_path / name), [clips]) for name in ("a.onnx", "b.onnx")
    )
    np.testing.assert_allclose(small, full, atol=1e-6)


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
    full, small = (
        _mean_logits(onnx.load(tmp_path / name), [clips]) for name in ("a.onnx", "b.onnx")
    )
    np.testing.assert_allclose(small, full, atol=1e-6)
