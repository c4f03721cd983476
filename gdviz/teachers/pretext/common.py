"""Parts that several tasks share: how clips are drawn, and how a choice is scored."""

from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from gdviz.data.clips import augment, sample_clips

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
