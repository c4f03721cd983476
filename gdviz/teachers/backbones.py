"""Backbones by name, the classifier on top, and what they weigh."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models import video as zoo


class Backbone(nn.Module):
    """A trunk that maps clips to feature maps, and their mean over space and time."""

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk, self.dim = trunk, dim

    def maps(self, clips: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d t2 h2 w2"]:
        return self.trunk(clips.contiguous(memory_format=torch.channels_last_3d))

    def forward(self, clips: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d"]:
        return self.maps(clips).mean((2, 3, 4))


class Renormalise(nn.Module):
    """Clips as this package scales them, ``(x - 0.5) / 0.25``, to ``(x - mean) / std`` of a colour: what foreign weights expect."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("scale", (0.25 / torch.tensor(std)).view(1, 3, 1, 1, 1))
        self.register_buffer(
            "shift", ((0.5 - torch.tensor(mean)) / torch.tensor(std)).view(1, 3, 1, 1, 1)
        )

    def forward(self, clips: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        return clips * self.scale + self.shift


class Classifier(nn.Module):
    """A backbone and a linear layer: logits and the features they come from."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.dim, classes)

    def forward(
        self, clips: Float[Tensor, "b 3 t h w"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b d"]]:
        features = self.backbone(clips)
        return self.fc(features), features


class _Block(nn.Module):
    """(2+1)D residual block: a spatial convolution, then a temporal one (Tran et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, space: int, time: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(inputs, outputs, (1, 3, 3), (1, space, space), (0, 1, 1), bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv3d(outputs, outputs, (3, 1, 1), (time, 1, 1), (1, 0, 0), bias=False),
            nn.BatchNorm3d(outputs),
        )
        same = inputs == outputs and space == time == 1
        self.skip = (
            nn.Identity()
            if same
            else nn.Conv3d(inputs, outputs, 1, (time, space, space), bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class _Motion(nn.Module):
    """A clip less its mean frame, divided by what is left: ``x - mean_t x`` of unit mean square."""

    def forward(self, x: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        x = x - x.mean(2, keepdim=True)
        return x * (x.square().mean((1, 2, 3, 4), keepdim=True) + 1e-6).rsqrt()


INPUTS = {"": (), "n": (nn.InstanceNorm3d(3),), "m": (_Motion(),)}


def _tiny(width: int, sees: str) -> Backbone:
    """A small R(2+1)D for clips of 24 to 64 pixels; ``width`` channels after the stem, four times as many at the end.

    ``sees``: ``""`` clips as they are, ``"n"`` each divided by its own deviation, ``"m"`` each less its mean frame.
    The embedded clips differ most in appearance. From scratch on 84 labelled clips ``tiny16`` is right on 7, 24 and
    40 % of the test clips, told all true labels for four epochs on 8, 53 and 61 % (one draw, one seed).
    """
    stem = nn.Sequential(
        *INPUTS[sees],
        nn.Conv3d(3, width, (1, 5, 5), (1, 2, 2), (0, 2, 2), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
        nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )
    blocks = [
        _Block(width, 2 * width, 2, 1),
        _Block(2 * width, 2 * width, 1, 1),
        _Block(2 * width, 4 * width, 2, 2),
    ]
    return Backbone(nn.Sequential(stem, *blocks), 4 * width)


ZOO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")


def _from_zoo(name: str, kinetics: bool) -> Backbone:
    net = getattr(zoo, name)(weights=None)
    if kinetics:
        weights = get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(check_hash=True, progress=False)
        except (OSError, RuntimeError) as error:
            home = Path(torch.hub.get_dir()) / "checkpoints"
            raise ValueError(
                f"cannot fetch {weights.url} ({error}); put that file into {home}, or take {name}, untrained"
            ) from error
        if not next(net.parameters()).is_meta:  # there, only sizes are checked
            net.load_state_dict(state)
    stages = (
        [net.features]
        if name == "s3d"
        else [net.stem, net.layer1, net.layer2, net.layer3, net.layer4]
    )
    scale = (
        [Renormalise((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))]
        if kinetics
        else []
    )
    return Backbone(nn.Sequential(*scale, *stages), 1024 if name == "s3d" else 512)


def build_backbone(name: str) -> Backbone:
    """Builds a backbone, untrained but for ``@kinetics``.

    Args:
        name: one of torchvision's ``r3d_18``, ``mc3_18``, ``r2plus1d_18``, ``s3d``, with ``@kinetics`` after it for
            torchvision's weights (supervised, Kinetics-400), or ``tinyW`` for a small R(2+1)D of width W (``tiny8``,
            ``tiny16``), ``tinyWn`` for one that standardises every clip, ``tinyWm`` for one that sees it less its mean frame.

    Raises:
        ValueError: unknown name, the message lists the known ones; or weights that are neither at hand nor to be had.
    """
    base, _, weights = name.partition("@")
    if tiny := re.fullmatch(r"tiny(\d+)([nm]?)", name):
        backbone = _tiny(int(tiny[1]), tiny[2])
    elif base in ZOO and weights in ("", "kinetics"):
        backbone = _from_zoo(base, bool(weights))
    else:
        known = f"{', '.join(ZOO)}, with @kinetics for pretrained weights"
        raise ValueError(
            f"unknown backbone {name!r}: choose tinyW (tiny8, tiny16, ...), tinyWn, tinyWm or one of {known}"
        )
    return backbone.to(memory_format=torch.channels_last_3d)
