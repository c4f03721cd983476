"""A student as ONNX, in full precision and quantised."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import unfold

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

    Ranges of activations are means over batches, which outliers move less; weights are rounded by
    :func:`round_together`; and the last bias is shifted until mean logits are those of ``path``
    (bias correction, Nagel et al. 2019, section 4.2). Two-dimensional convolutions only. On the
    demo's student int8 made three-dimensional ones twice as slow; and its linear layer, which takes
    no time, alone changed 8 % of the answers. Return how many convolutions are in int8, and how
    many there are.
    """
    onnx, quantization = _onnx()
    whole = onnx.load(path)
    convs = [node for node in whole.graph.node if node.op_type == "Conv"]
    weights = _arrays(whole)
    deep = [node.name for node in convs if weights[node.input[1]].ndim > 4]

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
        extra_options={"CalibMovingAverage": True},
    )
    model = onnx.load(out)
    constants, rounded = _arrays(model), {}
    for name, moments in _second_moments(whole, clips).items():
        w, scale = (torch.tensor(x).double() for x in (weights[name], constants[f"{name}_scale"]))
        q = round_together(w.flatten(1), scale, moments).reshape(w.shape)
        rounded[f"{name}_quantized"] = q.numpy().astype(np.int8)
    _put(model, rounded)
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    (bias,) = (name for name in last.input if name in constants and constants[name].ndim == 1)
    apart = _mean_logits(whole, clips) - _mean_logits(model, clips)
    _put(model, {bias: constants[bias] + apart})
    onnx.save(model, out)
    return len(convs) - len(deep), len(convs)


def round_together(
    w: Float[Tensor, "o i"], scale: Float[Tensor, " o"], moments: Float[Tensor, "i i"]
) -> Float[Tensor, "o i"]:
    """Return integers ``q`` in [-127, 127] that keep ``tr (w - s q) H (w - s q)'`` small.

    That is by how much outputs change, ``H`` being the second moments of the inputs, to which a
    hundredth of their mean diagonal is added. One input's weights are rounded after the other, and
    those still to come make up for the error (GPTQ, Frantar et al. 2023, algorithm 1).
    """
    eye = torch.eye(len(moments), dtype=moments.dtype)
    damped = moments + (0.01 * moments.diagonal().mean() + 1e-12) * eye
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, q = w.clone(), torch.zeros_like(w)
    for i in range(len(eye)):
        q[:, i] = (left[:, i] / scale).round().clamp(-127, 127)
        error = (left[:, i] - scale * q[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    return q


def _second_moments(model: Any, clips: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return, by the name of its weight, ``sum x x'`` of the patches that a convolution sees.

    Of two-dimensional ones without groups, and of up to 64 maps a batch.
    """
    onnx, _ = _onnx()
    weights, told, convs = _arrays(model), onnx.ModelProto(), []
    for node in model.graph.node:
        how = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv" and weights[node.input[1]].ndim == 4 and how["group"] == 1:
            convs.append((*node.input[:2], how))
    names = list(dict.fromkeys(entry for entry, _, _ in convs))
    told.CopyFrom(model)
    more = [onnx.helper.make_empty_tensor_value_info(name) for name in names if name != "clips"]
    told.graph.output.extend(more)
    found: dict[str, Any] = {name: 0.0 for _, name, _ in convs}
    if not names:
        return found
    for outputs in answers(told, names, clips):
        maps = dict(zip(names, outputs, strict=True))
        for entry, name, how in convs:
            x = torch.tensor(maps[entry])
            x, size = x[:: 1 + (len(x) - 1) // 64], weights[name].shape[2:]
            seen = unfold(x, size, how["dilations"], how["pads"][:2], how["strides"])
            seen = seen.transpose(0, 1).flatten(1)
            found[name] = found[name] + (seen @ seen.T).double()
    return found


def _arrays(model: Any) -> dict[str, np.ndarray]:
    """Return the constants of a model by name."""
    onnx, _ = _onnx()
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _put(model: Any, arrays: dict[str, np.ndarray]) -> None:
    onnx, _ = _onnx()
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))


def answers(model: Any, names: list[str], clips: Iterable[Tensor]) -> Iterator[list[np.ndarray]]:
    """Yield what ONNX Runtime makes of batches of clips: a model's outputs of these names."""
    session: Any = import_module("onnxruntime").InferenceSession(model.SerializeToString())
    return (session.run(names, {"clips": part.numpy()}) for part in clips)


def _mean_logits(model: Any, clips: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([z for (z,) in answers(model, ["logits"], clips)]).mean(0)
