"""Pace: how far apart are the frames of a clip? (Benaim et al. 2020; Wang et al. 2020)."""

import torch
from torch import Generator, Tensor, nn

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Clips, Scored, Videos, draw_clips, score_choice


class PlaybackPace(nn.Module):
    """Name the stride a clip was taken with: 1, 2 or 3.

    Loss: cross-entropy. Metric: accuracy. Chance: 1/3. Published (Wang et al., with a contrastive
    loss beside) for R(2+1)D, pre-trained on Kinetics and fine-tuned: 77.1 % on UCF101, 36.6 % on
    HMDB51.
    """

    metric, chance = "accuracy", 1 / 3
    strides = (1, 2, 3)

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length = length
        self.head = nn.Linear(dim, len(self.strides))

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return clips and the index of each one's stride."""
        longest = (videos.shape[1] - 1) // (self.length - 1)
        usable = torch.tensor([stride for stride in self.strides if stride <= longest])
        target = torch.randint(len(usable), (len(videos),), generator=rng)
        return draw_clips(videos, self.length, usable[target], rng), target.to(videos.device)

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        return score_choice(self.head(backbone(clips)), target)
