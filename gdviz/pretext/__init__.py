"""Self-supervised tasks, one small file each.

A task turns videos into inputs and targets (``views``), owns its head, and scores a backbone
(``forward`` returns the loss and a metric). Adding one: write the file, name it in ``TASKS``.
"""

from gdviz.pretext.clip_order import ClipOrder
from gdviz.pretext.coherence import TemporalCoherence
from gdviz.pretext.contrast import Contrast
from gdviz.pretext.masked import MaskedVideo
from gdviz.pretext.order import FrameOrder
from gdviz.pretext.pace import PlaybackPace
from gdviz.pretext.prediction import FuturePrediction
from gdviz.pretext.registration import Registration
from gdviz.pretext.rotation import Rotation

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
