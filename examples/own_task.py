"""A pretext task of your own: the arrow of time (Wei et al. 2018). Does a clip run backwards?

gdviz run --teachers.tasks order examples.own_task:ArrowOfTime --teachers.strides 2 2
"""

import torch
from torch import nn

from gdviz.teachers.pretext.common import draw_clips, score_choice


class ArrowOfTime(nn.Module):
    """Tell clips that run forwards from the same ones backwards."""

    metric, chance = "accuracy", 1 / 2

    def __init__(self, dim, length, stride):
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 2)

    def views(self, videos, rng):
        """Return clips [2n, 3, t, h, w] and which of them run backwards [2n]."""
        half = videos[: (len(videos) + 1) // 2]  # each clip is seen twice
        clips = draw_clips(half, self.length, self.stride, rng)
        target = torch.arange(2, device=clips.device).repeat_interleave(len(clips))
        return torch.cat([clips, clips.flip(2)]), target

    def forward(self, backbone, clips, target):
        """Return the loss and the metric."""
        return score_choice(self.head(backbone(clips)), target)
