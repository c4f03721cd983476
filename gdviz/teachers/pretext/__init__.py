"""Self-supervised tasks, one small file each.

A task turns videos into inputs and targets (``views``), owns its head, and scores a backbone
(``forward``). Write your own in a file of yours and name it MODULE:NAME (docs/own.md).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.clip_order import ClipOrder
from gdviz.teachers.pretext.coherence import TemporalCoherence
from gdviz.teachers.pretext.common import Scored, Videos
from gdviz.teachers.pretext.contrast import Contrast
from gdviz.teachers.pretext.masked import MaskedVideo
from gdviz.teachers.pretext.order import FrameOrder
from gdviz.teachers.pretext.pace import PlaybackPace
from gdviz.teachers.pretext.prediction import FuturePrediction
from gdviz.teachers.pretext.registration import Registration
from gdviz.teachers.pretext.rotation import Rotation


@runtime_checkable
class PretextTask(Protocol):
    """A ``torch.nn.Module`` of this shape; its parameters are trained with the backbone's."""

    metric: str  # name of what ``forward`` returns beside the loss
    chance: float  # the metric of a backbone that has learned nothing

    def __init__(self, dim: int, length: int, stride: int) -> None:
        """Take the size of features, the frames of a clip, and how far apart these are.

        Raises:
            UserError: the task needs longer clips.
        """

    def views(self, videos: Videos, rng: Generator) -> tuple[Tensor, Tensor]:
        """Return inputs and targets; what is random comes from ``rng``, which is on the CPU."""
        ...

    def forward(self, backbone: Backbone, inputs: Tensor, target: Tensor, /) -> Scored:
        """Return the loss and the metric.

        Clips [b, 3, t, h, w] have features ``backbone(clips)`` [b, d], and maps
        ``backbone.maps(clips)`` [b, d, t2, h2, w2]. Processes that train together average their
        losses; one that is no mean over clips needs ``gdviz.core.distributed.gather``.
        """
        ...


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
