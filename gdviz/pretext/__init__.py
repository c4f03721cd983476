"""Self-supervised tasks, one small file each.

A task turns videos into inputs and targets (``views``), owns its head, and scores a backbone
(``forward`` returns the loss and a metric). Adding one: write the file, name it in ``TASKS``.
"""

from gdviz.pretext.coherence import TemporalCoherence
from gdviz.pretext.order import FrameOrder
from gdviz.pretext.pace import PlaybackPace
from gdviz.pretext.prediction import FuturePrediction
from gdviz.pretext.registration import Registration

TASKS = {
    "order": FrameOrder,
    "coherence": TemporalCoherence,
    "registration": Registration,
    "prediction": FuturePrediction,
    "pace": PlaybackPace,
}

__all__ = ["TASKS", "FrameOrder", "FuturePrediction", "PlaybackPace", "Registration", "TemporalCoherence"]
