"""Students by name: light (2+1)D networks of 2D convolutions, TSM, and one that streams."""

from __future__ import annotations

import re

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad
from torchvision.models import mobilenet_v3_small
from torchvision.models.mobilenetv3 import InvertedResidual

from gdviz.core.files import UserError
from gdviz.teachers.backbones import Backbone, Classifier, Clips, build_backbone, look

# channels after the stem, and how many residual blocks each of three stages has
SIZES = {
    "2xs": (12, 0, 0, 0),
    "xs": (16, 1, 1, 1),
    "s": (24, 1, 1, 1),
    "m": (32, 1, 1, 2),
    "l": (64, 1, 2, 3),
}
STUDENTS = (*(f"light-{size}" for size in SIZES), "shift-small", "causal-s")

State = tuple[Tensor, ...]  # of a stream: two past frames a block, sum of features, frames seen


def _step(step: int, size: int, least: int) -> int:
    """Return the largest of ``step``, ``step // 2``, ..., 1 that leaves ``least`` of ``size``."""
    while step > 1 and size < step * least:
        step //= 2
    return step


class _Block(nn.Module):
    """A (2+1)D convolution (Tran et al. 2018) as two of 2D; residual where the shape stays.

    The first sees frames, folded into the batch, the second ``[time, pixels]``. In channels-last
    memory one is a view of the other, and nothing is copied. Strides ``space`` and ``time`` are
    smaller where few pixels of a side or frames would be left. A causal block sees two frames back,
    the others one to each side.
    """

    def __init__(
        self, inputs: int, outputs: int, space: int = 1, time: int = 1, causal: bool = False
    ) -> None:
        super().__init__()
        self.space, self.time, self.causal = space, time, causal
        self.skips, self.stem = inputs == outputs, inputs == 3
        self.across = nn.Conv2d(inputs, outputs, 7 if self.stem else 3, bias=False)
        self.along = nn.Conv2d(outputs, outputs, (3, 1), bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])

    def step(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return maps [b, d, t2, h2, w2], and what a causal block keeps: two frames [b, d, 2, p].

        None, and zeros, are the past of a first frame.
        """
        batch, _, frames, height, width = x.shape
        space = _step(self.space, min(height, width), 12 if self.stem else 3)
        time = _step(self.time, frames, 8 if self.stem else 4)
        y = x.transpose(1, 2).flatten(0, 1)
        y = conv2d(y, self.across.weight, None, space, self.across.weight.shape[-1] // 2)
        y = torch.relu(self.norms[0](y))
        sides = y.shape[2:]
        y = y.unflatten(0, (batch, frames)).transpose(1, 2).flatten(3)  # [b, d, t, pixels]
        if self.causal:
            y = pad(y, (0, 0, 2, 0)) if past is None else torch.cat([past, y], 2)
        new = conv2d(y, self.along.weight, None, (time, 1), (0 if self.causal else 1, 0))
        new = self.norms[1](new).unflatten(3, sides)
        return torch.relu(new + x if self.skips else new), y[:, :, -2:]

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, None)[0]


def _light(size: str, sees: str = "", *, causal: bool = False) -> Backbone:
    """Build a light network of a size in ``SIZES``.

    Convolutions are dense: one thread does 50 to 80 G multiply-adds a second of them, but 5 to 17
    of depthwise ones, so inverted residuals would save FLOPs and no time. The stem takes sides by
    four at once, where most of the pixels are. The one that streams keeps every frame.
    """
    width, *depths = SIZES[size]
    time = 1 if causal else 2
    blocks = [_Block(3, width, 4, time, causal)]
    for stage, depth in enumerate(depths):
        channels = width * 2**stage
        if stage:
            blocks.append(_Block(channels // 2, channels, 2, time if stage == 2 else 1, causal))
        blocks += [_Block(channels, channels, causal=causal) for _ in range(depth)]
    return Backbone(nn.Sequential(*look(sees), *blocks), 4 * width)


class _Shifted(nn.Module):
    """MobileNetV3-small on frames, with temporal shift in its residual branches (TSM, Lin 2019).

    An eighth of the channels comes from the next frame, another from the one before. Frames of
    less than 96 pixels are enlarged: the network takes sides by 32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = mobilenet_v3_small(weights=None).features

    def forward(self, clips: Clips) -> Tensor:
        batch, _, frames = clips.shape[:3]
        x = clips.transpose(1, 2).flatten(0, 1)
        if min(x.shape[2:]) < 96:
            x = interpolate(x, (96, 96), mode="bilinear", align_corners=False)
        for layer in self.layers:
            if isinstance(layer, InvertedResidual) and layer.use_res_connect:
                x = x + layer.block(self._shift(x.unflatten(0, (batch, frames))).flatten(0, 1))
            else:
                x = layer(x)
        return x.unflatten(0, (batch, frames)).transpose(1, 2)

    @staticmethod
    def _shift(x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        n = x.shape[2] // 8
        ahead = pad(x[:, 1:, :n], (0, 0, 0, 0, 0, 0, 0, 1))
        behind = pad(x[:, :-1, n : 2 * n], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([ahead, behind, x[:, :, 2 * n :]], 2)


class StreamingClassifier(Classifier):
    """A causal student: it answers after every frame, of all frames so far."""

    def stream(
        self, frame: Float[Tensor, "b 3 h w"], state: State | None = None
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b d"], State]:
        """Return logits, features and the state to hand over with the next frame.

        They are those of the clip of all frames since ``state`` was None, in eval mode; the state's
        size does not depend on how many.
        """
        x, kept = frame[:, :, None], []
        for number, block in enumerate(self.backbone.trunk.children()):
            assert isinstance(block, _Block)
            x, past = block.step(x, state[number] if state else None)
            kept.append(past)
        total, seen = x.mean((2, 3, 4)), x.new_ones(1)
        if state:
            total, seen = total + state[-2], seen + state[-1]
        features = total / seen
        return self.fc(features), features, (*kept, total, seen)


def build_student(name: str, classes: int) -> Classifier:
    """Build an untrained student: a light backbone and a linear head.

    =========== ========== ====== =========================================================
    name        parameters GFLOPs (2 a multiply-add; of 101 classes and clips of 16x112x112)
    =========== ========== ====== =========================================================
    light-2xs   0.03 M     0.07   for the embedded data
    light-xs    0.11 M     0.21   suffix n, as light-xsn: standardises every clip;
    light-s     0.25 M     0.42   suffix m: sees it minus its mean frame;
    light-m     0.63 M     0.79   clips of 24x24 pixels keep maps of 3x3
    light-l     3.47 M     3.86
    shift-small 0.99 M     0.49   torchvision's mobilenet_v3_small with temporal shift
    causal-s    0.25 M     0.87   streams (:class:`StreamingClassifier`)
    =========== ========== ====== =========================================================

    Other names are those of :func:`gdviz.teachers.backbones.build_backbone`.

    Raises:
        UserError: no such name.
    """
    if name == "causal-s":
        backbone = _light("s", causal=True)
    elif light := re.fullmatch(rf"light-({'|'.join(SIZES)})([nm]?)", name):
        backbone = _light(light[1], light[2])
    elif name == "shift-small":
        backbone = Backbone(_Shifted(), 576)
    else:
        try:
            return Classifier(build_backbone(name), classes)
        except UserError as error:
            raise UserError(f"{error}; or a light student: {', '.join(STUDENTS)}") from error
    kind = StreamingClassifier if name == "causal-s" else Classifier
    return kind(backbone.to(memory_format=torch.channels_last), classes)
