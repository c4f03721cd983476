"""Self-supervised tasks, one small file each.

A task turns videos into inputs and targets (``views``), owns its head, and scores a backbone
(``forward`` returns the loss and a metric). Adding one: write the file, name it in ``TASKS``.
"""

from gdviz.teachers.pretext.clip_order import ClipOrder
from gdviz.teachers.pretext.coherence import TemporalCoherence
from gdviz.teachers.pretext.contrast import Contrast
from gdviz.teachers.pretext.masked import MaskedVideo
from gdviz.teachers.pretext.order import FrameOrder
from gdviz.teachers.pretext.pace import PlaybackPace
from gdviz.teachers.pretext.prediction import FuturePrediction
from gdviz.teachers.pretext.registration import Registration
from gdviz.teachers.pretext.rotation import Rotation

TASKS = {
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
    "Registration",
    "Rotation",
    "TemporalCoherence",
]
