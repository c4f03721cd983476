"""Self-supervised tasks, one small file each.

A task turns videos into inputs and targets (``views``), owns its head, and scores a backbone. Write
your own in a file of yours and name it MODULE:NAME (docs/own.md), or here: one file, one line
below.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Generator, Tensor

from gdviz.teachers.pretext.clip_order import ClipOrder
from gdviz.teachers.pretext.coherence import TemporalCoherence
from gdviz.teachers.pretext.contrast import Contrast
from gdviz.teachers.pretext.masked import MaskedVideo
from gdviz.teachers.pretext.order import FrameOrder
from gdviz.teachers.pretext.pace import PlaybackPace
from gdviz.teachers.pretext.prediction import FuturePrediction
from gdviz.teachers.pretext.registration import Registration
from gdviz.teachers.pretext.rotation import Rotation


class PretextTask(Protocol):
    """What a task is: a ``torch.nn.Module`` that is built from the sizes and has these members.

    Attributes:
        metric: name of what ``forward`` returns beside the loss.
        chance: the metric of a backbone that has learned nothing.
    """

    metric: ClassVar[str]
    chance: ClassVar[float]

    def __init__(self, dim: int, length: int, stride: int) -> None:
        """Take the size of the features, frames of a clip, and frames from one to the next."""

    def views(self, videos: Tensor, rng: Generator) -> tuple[Any, Any]:
        """Return inputs and target of videos [b, f, 3, h, w], drawn by ``rng`` alone."""

    def forward(self, backbone: Any, inputs: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the metric, scalars; ``backbone(clips)`` gives features [b, d]."""


TASKS: dict[str, type[PretextTask]] = {
    "order": FrameOrder,
    "coherence": TemporalCoherence,
    "registration": Registration,
    "prediction": FuturePrediction,
    "pace": PlaybackPace,
    "clip-order": ClipOrder,
    "rotation": Rotation,
    "contrast": Contrast,
    "masked": MaskedVideo,
}

__all__ = [
    "TASKS",
    "ClipOrder",
    "Contrast",
    "FrameOrder",
    "FuturePrediction",
    "MaskedVideo",
    "PlaybackPace",
    "PretextTask",
    "Registration",
    "Rotation",
    "TemporalCoherence",
]
