"""A student as ONNX, in full precision and quantised."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdviz.core.files import UserError
from gdviz.teachers.backbones import Clips


def _onnx() -> Any:
    try:
        import onnx
        import onnxruntime.quantization
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"gdviz export: {error}; pip install 'gdviz[export]'") from None
    return onnx, onnxruntime.quantization


class Logits(nn.Module):
    """A classifier that answers with its logits only."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, clips: Clips) -> Tensor:
        return self.classifier(clips)[0]


def export_onnx(classifier: nn.Module, clips: Clips, path: Path) -> None:
    """Write ``clips [b, 3, t, h, w] -> logits [b, c]`` for any b; ``clips`` tell the other sizes.

    Raises:
        UserError: ONNX is not installed.
    """
    _onnx()
    model, example = Logits(classifier).cpu().eval(), (clips[:2].cpu(),)
    batch = {"clips": {0: torch.export.Dim("batch")}}
    words = io.StringIO()  # the exporter talks
    with torch.inference_mode(False), redirect_stdout(words), redirect_stderr(words):
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            dynamic_shapes=batch,
            input_names=["clips"],
            output_names=["logits"],
        )
        assert program is not None
        program.save(path, external_data=False)


def quantise(path: Path, out: Path, clips: Iterable[Clips]) -> None:
    """Write a model's static int8 form, calibrated on batches of clips (QDQ, a scale a channel).

    Two-dimensional convolutions only. On the demo's student int8 made three-dimensional ones twice
    as slow; and its linear layer, which takes no time, alone changed 8 % of the answers.
    """
    onnx, quantization = _onnx()
    graph = onnx.load(path).graph
    shape_of = {tensor.name: tensor.dims for tensor in graph.initializer}
    deep = [n.name for n in graph.node if n.op_type == "Conv" and len(shape_of[n.input[1]]) > 4]

    class Reader(quantization.CalibrationDataReader):
        left = iter([{"clips": part.numpy()} for part in clips])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    quantization.quantize_static(
        path,
        out,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=deep,
    )
