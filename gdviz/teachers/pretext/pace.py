"""Playback pace: tell how many frames were skipped between two frames of a clip (Benaim et al.
2020; Wang et al. 2020)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class PlaybackPace(nn.Module):
    """Classifies the stride a clip was sampled with, one of 1, 2, 3. Loss: cross-entropy. Chance:
    1/3.

    Published (Wang et al., together with a contrastive loss) for R(2+1)D, pre-trained on Kinetics
    and fine-tuned: 77.1 % on UCF101, 36.6 % on HMDB51.
    """

    metric, chance = "accuracy", 1 / 3
    strides = (1, 2, 3)

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length = length
        self.head = nn.Linear(dim, len(self.strides))

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Clips [b, 3, t, h, w] and the index of each clip's stride [b]."""
        longest = (videos.shape[1] - 1) // (self.length - 1)
        usable = [s for s in self.strides if s <= longest]
        target = torch.randint(len(usable), (len(videos),), generator=rng)
        stride = torch.tensor(usable)[target]
        return augment(sample_clips(videos, self.length, stride, rng), rng), target.to(
            videos.device
        )

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(backbone(clips))
        return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
