"""Frame ordering: are these frames in order, or shuffled? (Misra et al. 2016, Shuffle and Learn)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.data.sampling import augment, sample_clips
from gdviz.models import Backbone


class FrameOrder(nn.Module):
    """Verifies temporal order: half of the clips keep theirs, half are shuffled frame by frame.

    Loss: cross-entropy over (in order, shuffled). Chance: 1/2. Naming *which* of the 4! orders four
    sub-clips were put in (Lee et al. 2017; Xu et al. 2019) never left chance within 20 passes over
    the embedded data with the small backbone; verification reaches 0.97 and teaches more.
    """

    metric, chance = "accuracy", 1 / 2

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 2)

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Clips [b, 3, t, h, w], half of them shuffled, and which are [b]."""
        clips = augment(sample_clips(videos, self.length, self.stride, rng), rng)
        target = torch.randint(2, (len(clips),), generator=rng)
        order = torch.rand(len(clips), self.length, generator=rng).argsort(1)
        order[target == 0] = torch.arange(self.length)
        index = order.to(clips.device).view(len(clips), 1, -1, 1, 1).expand_as(clips)
        return clips.gather(2, index), target.to(clips.device)

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(backbone(clips))
        return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
