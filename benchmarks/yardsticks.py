"""Light video networks of others, rebuilt from their papers' tables, untrained: for `gdviz bench
--yardsticks benchmarks.yardsticks:x3d_xs benchmarks.yardsticks:movinet_a0`.

Each comes with the `view` it was published for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdviz.config import View


def _norm(inputs: int, outputs: int, size=(1, 1, 1), step=1, groups=1, act=None) -> nn.Sequential:
    """Return a convolution that pads by half its size, and its batch norm."""
    edge = tuple(n // 2 for n in size)
    step = (1, step, step)
    conv = nn.Conv3d(inputs, outputs, size, step, edge, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), *([act] if act else []))


def _eighths(channels: float) -> int:
    """Round to a multiple of eight, by no more than a tenth down."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


class _Squeeze(nn.Module):
    """Squeeze and excitation (Hu et al. 2018) over space and time."""

    def __init__(self, channels: int, inner: int, act: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool3d(1),
            nn.Conv3d(channels, inner, 1),
            act,
            nn.Conv3d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


class _X3DBlock(nn.Module):
    """Feichtenhofer 2020: 1x1x1, channelwise 3x3x3, 1x1x1; ReLU, Swish, ReLU."""

    def __init__(self, inputs: int, outputs: int, step: int, squeezed: bool) -> None:
        super().__init__()
        inner = int(2.25 * outputs)
        gate = _Squeeze(inner, _eighths(inner / 16), nn.ReLU()) if squeezed else nn.Identity()
        self.body = nn.Sequential(
            _norm(inputs, inner, act=nn.ReLU()),
            _norm(inner, inner, (3, 3, 3), step, inner),
            gate,
            nn.SiLU(),
            _norm(inner, outputs),
        )
        self.skip = nn.Identity()
        if inputs != outputs:
            self.skip = _norm(inputs, outputs, step=step)
        elif step > 1:
            self.skip = nn.Conv3d(inputs, outputs, 1, (1, step, step), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def x3d_xs(classes: int = 400) -> nn.Module:
    """Build X3D-XS: 3.76 M parameters, 0.60 G multiply-adds of 4x160x160.

    Source: Feichtenhofer 2020, the table of X3D's stages; squeeze and excitation in every other
    block, as in the author's code.
    """
    layers = [_norm(3, 24, (1, 3, 3), 2)[0], _norm(24, 24, (5, 1, 1), 1, 24, nn.ReLU())]
    inputs = 24
    for outputs, depth in ((24, 3), (48, 5), (96, 11), (192, 7)):
        for number in range(depth):
            step = 1 if number else 2
            layers.append(_X3DBlock(inputs, outputs, step, number % 2 == 0))
            inputs = outputs
    layers += [_norm(192, 432, act=nn.ReLU()), nn.AdaptiveAvgPool3d(1)]
    layers += [nn.Conv3d(432, 2048, 1, bias=False), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(2048, classes))
    net.view = View(size=160, length=4)
    return net


class _MoViNetBlock(nn.Module):
    """Kondratyuk et al. 2021: expand, channelwise, squeeze, project; a scaled residual."""

    def __init__(self, inputs: int, inner: int, outputs: int, size, step: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(inputs, inner, act=nn.SiLU()),
            _norm(inner, inner, size, step, inner, nn.SiLU()),
            _Squeeze(inner, _eighths(inner / 4), nn.SiLU()),
            _norm(inner, outputs),
        )
        pool = [nn.AvgPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))] if step > 1 else []
        project = [_norm(inputs, outputs)] if step > 1 or inputs != outputs else []
        self.skip = nn.Sequential(*pool, *project)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.scale * self.body(x)


def movinet_a0(classes: int = 600) -> nn.Module:
    """Build MoViNet-A0 without stream buffers: 3.1 M parameters, 2.7 G multiply-adds of 50x172x172.

    Source: Kondratyuk et al. 2021, the table of the architecture of A0.
    """
    near, far, flat = (3, 3, 3), (5, 3, 3), (1, 5, 5)
    stages = (
        (8, ((40, flat),)),  # 24 in the authors' later code, for 2.63 GFLOPs
        (32, ((80, near), (80, near), (80, near))),
        (56, ((184, far), (112, near), (184, near))),
        (56, ((184, far), (184, near), (184, near), (184, near))),
        (104, ((384, far), (280, flat), (280, flat), (344, flat))),
    )
    layers, inputs = [_norm(3, 8, (1, 3, 3), 2, act=nn.SiLU())], 8
    for stage, (outputs, blocks) in enumerate(stages):
        for number, (inner, size) in enumerate(blocks):
            step = 1 if number or stage == 3 else 2
            layers.append(_MoViNetBlock(inputs, inner, outputs, size, step))
            inputs = outputs
    layers += [_norm(104, 480, act=nn.SiLU()), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(480, 2048), nn.SiLU(), nn.Dropout(0.2))
    net.append(nn.Linear(2048, classes))
    net.view = View(size=172, length=50)
    return net
