"""Rotation: which way up is the video? (3D RotNet, Jing et al. 2018; RotNet, Gidaris et al.
2018)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class Rotation(nn.Module):
    """Classifies by how many quarter turns a whole clip was turned. Loss: cross-entropy. Metric:
    accuracy. Chance: 1/4.

    All four forms of a clip share a batch (Gidaris et al.), so that what is seen cannot answer,
    only how it stands. Published for a 3D ResNet-18, pre-trained on Kinetics and fine-tuned: 62.9 %
    on UCF101, 33.7 % on HMDB51.
    Where the world has no up and down there is little to learn: on the embedded data a tiny16 was
    right on 0.35 of its training clips after 60 passes.
    """

    metric, chance = "accuracy", 1 / 4

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 4)

    def views(self, videos: Float[Tensor, "b f 3 h h"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Clips turned by 0, 90, 180, 270 degrees [4n, 3, t, h, h] and the quarter turns [4n]; n =
        b / 4: each is seen four times."""
        clips = augment(
            sample_clips(videos[: (len(videos) + 3) // 4], self.length, self.stride, rng), rng
        )
        turned = torch.cat([clips.rot90(k, (3, 4)) for k in range(4)])
        return turned, torch.arange(4, device=clips.device).repeat_interleave(len(clips))

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(backbone(clips))
        return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
