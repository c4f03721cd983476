"""Backbones by name, and the classifier on top."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models import video as zoo

from gdviz.core.files import UserError

ZOO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # mean and std of colours

Clips = Float[Tensor, "b 3 t h w"]


class Backbone(nn.Module):
    """A trunk that gives feature maps of clips; features are their mean over space and time."""

    trunk: nn.Module

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk, self.dim = trunk, dim

    def maps(self, clips: Clips) -> Float[Tensor, "b d t2 h2 w2"]:
        return self.trunk(clips.contiguous(memory_format=torch.channels_last_3d))

    def forward(self, clips: Clips) -> Float[Tensor, "b d"]:
        return self.maps(clips).mean((2, 3, 4))


class Classifier(nn.Module):
    """A backbone and a linear layer: logits and the features they come from."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(backbone.dim, classes)

    def forward(self, clips: Clips) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b d"]]:
        features = self.backbone(clips)
        return self.fc(features), features


class Renormalise(nn.Module):
    """Turn ``(x - 0.5) / 0.25``, as this package scales clips, into ``(x - mean) / std``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        centre, spread = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (mean, std))
        self.register_buffer("scale", 0.25 / spread)
        self.register_buffer("shift", (0.5 - centre) / spread)

    def forward(self, clips: Clips) -> Clips:
        return clips * self.scale + self.shift


class _Motion(nn.Module):
    """Keep of a clip what moves: ``x - mean_t x``, scaled to unit mean square."""

    def forward(self, x: Clips) -> Clips:
        x = x - x.mean(2, keepdim=True)
        return x * (x.square().mean((1, 2, 3, 4), keepdim=True) + 1e-6).rsqrt()


def look(sees: str) -> list[nn.Module]:
    """Return what a suffix puts before a network: n standardises a clip, m leaves what moves."""
    return {"": [], "n": [nn.InstanceNorm3d(3)], "m": [_Motion()]}[sees]


def _conv(inputs: int, outputs: int, size: int, space: int, time: int) -> list[nn.Module]:
    """Return a (2+1)D convolution (Tran et al. 2018): ``size`` pixels wide, then three frames."""
    edge, step = size // 2, (1, space, space)
    across = nn.Conv3d(inputs, outputs, (1, size, size), step, (0, edge, edge), bias=False)
    along = nn.Conv3d(outputs, outputs, (3, 1, 1), (time, 1, 1), (1, 0, 0), bias=False)
    return [across, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True), along, nn.BatchNorm3d(outputs)]


class _Block(nn.Module):
    """A residual block; ``space`` and ``time`` are its strides."""

    def __init__(self, inputs: int, outputs: int, space: int, time: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(inputs, outputs, 3, space, time))
        self.skip = nn.Identity()
        if inputs != outputs or space != 1 or time != 1:
            self.skip = nn.Conv3d(inputs, outputs, 1, (time, space, space), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def _tiny(width: int, sees: str) -> Backbone:
    """Build a small R(2+1)D for clips of 24 to 64 pixels, ``width`` channels after the stem.

    The embedded clips differ most in appearance, which the suffixes take away. From scratch on 84
    labelled clips ``tiny16`` is right on 7, 24 (n) and 40 % (m) of the test clips, with all true
    labels for four epochs on 8, 53 and 61 % (one seed).
    """
    stem = nn.Sequential(*look(sees), *_conv(3, width, 5, 2, 1), nn.ReLU(inplace=True))
    sizes = ((1, 2, 2, 1), (2, 2, 1, 1), (2, 4, 2, 2))
    blocks = [_Block(n * width, m * width, space, time) for n, m, space, time in sizes]
    return Backbone(nn.Sequential(stem, *blocks), 4 * width)


def _from_zoo(name: str, kinetics: bool) -> Backbone:
    """Build one of torchvision's; ``kinetics`` fetches its weights."""
    net, scale = getattr(zoo, name)(weights=None), []
    if kinetics:
        weights, scale = get_model_weights(name)["DEFAULT"], [Renormalise(*KINETICS)]
        try:
            state = weights.get_state_dict(check_hash=True, progress=False)
        except (OSError, RuntimeError) as error:
            home = Path(torch.hub.get_dir()) / "checkpoints"
            advice = f"put that file into {home}, or take {name}, untrained"
            raise UserError(f"cannot fetch {weights.url} ({error}); {advice}") from error
        if not next(net.parameters()).is_meta:  # there, only sizes are checked
            net.load_state_dict(state)
    stages = list(net.children())[:-2]  # without the pooling and the head
    return Backbone(nn.Sequential(*scale, *stages), 1024 if name == "s3d" else 512)


def build_backbone(name: str) -> Backbone:
    """Build a backbone by name, untrained but for ``@kinetics``.

    Names are torchvision's in ``ZOO``, with ``@kinetics`` after them for weights (supervised,
    Kinetics-400); or ``tinyW``, a small R(2+1)D of width W (``tiny8``), ``tinyWn``, which
    standardises every clip, or ``tinyWm``, which sees it minus its mean frame.

    Raises:
        UserError: unknown name, or weights that are neither at hand nor to be had.
    """
    base, _, weights = name.partition("@")
    if tiny := re.fullmatch(r"tiny([1-9]\d{0,2})([nm]?)", name):
        backbone = _tiny(int(tiny[1]), tiny[2])
    elif base in ZOO and weights in ("", "kinetics"):
        backbone = _from_zoo(base, bool(weights))
    else:
        choice = f"tinyW (tiny8, tiny16, ...), tinyWn, tinyWm or one of {', '.join(ZOO)}"
        weights = "with @kinetics for pretrained weights"
        raise UserError(f"unknown backbone {name!r}: choose {choice}, {weights}")
    return backbone.to(memory_format=torch.channels_last_3d)
