"""The shape of a task, and parts that several share."""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.core.files import UserError
from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone

Videos = Float[Tensor, "b f 3 h w"]
Clips = Float[Tensor, "n 3 t h w"]
Choice = Int[Tensor, " n"]
Scored = tuple[Float[Tensor, ""], Float[Tensor, ""]]  # the loss, the metric


def draw_clips(
    videos: Videos, length: int, stride: int | Tensor, rng: Generator, strength: float = 1.0
) -> Float[Tensor, "b 3 t h w"]:
    """Return a clip from anywhere in each video, augmented alike in all of its frames."""
    return augment(sample_clips(videos, length, stride, rng), rng, strength)


def score_choice(logits: Float[Tensor, "n c"], target: Choice) -> Scored:
    """Return cross-entropy and accuracy."""
    return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()


class PretextTask(nn.Module):
    """A task: turns videos into inputs and targets, and scores a backbone by a head of its own.

    Subclass it, or write any module of this shape; its parameters are trained with the backbone's.
    Features have ``dim`` numbers, clips ``length`` frames that are ``stride`` apart in a video.

    Raises:
        UserError: the task needs longer clips.
    """

    metric: ClassVar[str] = "accuracy"  # what ``forward`` returns beside the loss
    chance: ClassVar[float]  # the metric of a backbone that has learned nothing
    shortest: ClassVar[int] = 1  # frames that a clip needs
    outputs: ClassVar[int] = 0  # of a linear head; 0: the task makes another

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        if length < self.shortest:
            needs = f"{type(self).__name__} needs {self.shortest} frames or more"
            raise UserError(f"length={length}: {needs}; give it longer clips")
        self.length, self.stride = length, stride
        if self.outputs:
            self.head = nn.Linear(dim, self.outputs)

    def draw(self, videos: Videos, rng: Generator, forms: int = 1) -> Clips:
        """Return clips of the first videos, so few that ``forms`` of each make up the batch."""
        return draw_clips(videos[: -(-len(videos) // forms)], self.length, self.stride, rng)

    def views(self, videos: Videos, rng: Generator) -> tuple[Tensor, Tensor]:
        """Return inputs and targets; what is random comes from ``rng``, which is on the CPU."""
        raise NotImplementedError

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> Scored:
        """Return the loss and the metric: here, of naming the target by the head.

        Clips [b, 3, t, h, w] have features ``backbone(clips)`` [b, d], and maps
        ``backbone.maps(clips)`` [b, d, t2, h2, w2]. Processes that train together average their
        losses; one that is no mean over clips needs ``gdviz.core.distributed.gather``.
        """
        return score_choice(self.answer(backbone(clips)), target)

    def answer(self, features: Tensor) -> Tensor:
        """Return logits [n, c] of the answers."""
        return self.head(features)


class NoTask(PretextTask):
    """Leave the backbone as it was drawn: the control of pre-training. The loss is zero."""

    metric, chance = "none", 0.0

    def views(self, videos: Videos, rng: Generator) -> tuple[Tensor, Tensor]:
        """Return nothing to look at."""
        return videos.new_zeros(1), videos.new_zeros(1)

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> Scored:
        loss = 0 * sum(p.sum() for p in backbone.parameters()) + clips.sum()
        return loss, clips.sum()
