"""A student as ONNX, in full precision and quantised."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
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


def quantise(path: Path, out: Path, clips: Sequence[Tensor]) -> tuple[int, int]:
    """Write a model's static int8 form, calibrated on batches of clips (QDQ, a scale a channel).

    Ranges of activations are means over batches, which outliers move less, and the last bias is
    shifted until mean logits are those of ``path`` (bias correction, Nagel et al. 2019, section
    4.2). Two-dimensional convolutions only. On the demo's student int8 made three-dimensional ones
    twice as slow; and its linear layer, which takes no time, alone changed 8 % of the answers.
    Return how many convolutions are in int8, and how many there are.
    """
    onnx, quantization = _onnx()
    graph = onnx.load(path).graph
    shape_of = {tensor.name: tensor.dims for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    deep = [node.name for node in convs if len(shape_of[node.input[1]]) > 4]

    class Reader(quantization.CalibrationDataReader):
        left = iter([{"clips": part.numpy()} for part in clips])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    how = {"quant_format": quantization.QuantFormat.QDQ, "per_channel": True}
    how |= {"op_types_to_quantize": ["Conv"], "nodes_to_exclude": deep}
    how |= {"extra_options": {"CalibMovingAverage": True}}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a preparation that PyTorch's exporter has done
    try:
        quantization.quantize_static(path, out, Reader(), **how)
    finally:
        logging.disable(before)
    whole, small = (logits_of(file, clips).mean(0) for file in (path, out))
    model = onnx.load(out)
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    known = (tensor for tensor in model.graph.initializer if tensor.name in last.input)
    (bias,) = (tensor for tensor in known if len(tensor.dims) == 1)
    shifted = onnx.numpy_helper.to_array(bias) + whole - small
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, bias.name))
    onnx.save(model, out)
    return len(convs) - len(deep), len(convs)


def logits_of(path: Path, clips: Iterable[Tensor]) -> Float[np.ndarray, "n c"]:
    """Return what an exported model says of batches of clips."""
    session = import_module("onnxruntime").InferenceSession(path)
    logits: Any = [session.run(None, {"clips": part.numpy()})[0] for part in clips]
    return np.concatenate(logits)
