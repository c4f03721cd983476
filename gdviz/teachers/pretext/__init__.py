"""Self-supervised tasks by name. Write your own in a file of yours and name it MODULE:NAME."""

from gdviz.teachers.pretext import choices, painting
from gdviz.teachers.pretext.common import NoTask, PretextTask
from gdviz.teachers.pretext.registration import Registration

TASKS: dict[str, type[PretextTask]] = {
    "order": choices.FrameOrder,
    "coherence": choices.TemporalCoherence,
    "registration": Registration,
    "prediction": painting.FuturePrediction,
    "pace": choices.PlaybackPace,
    "clip-order": choices.ClipOrder,
    "rotation": choices.Rotation,
    "contrast": choices.Contrast,
    "masked": painting.MaskedVideo,
    "none": NoTask,
}
