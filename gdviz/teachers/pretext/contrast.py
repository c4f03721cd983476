"""Contrast: two clips of one video are nearer to each other than to those of other videos (CVRL,
Qian et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class Contrast(nn.Module):
    """InfoNCE over 2n clips of n videos: ``-log exp(z_i . z_i' / t) / sum_{j != i} exp(z_i . z_j /
    t)``, t = 0.1, |z| = 1.

    Two starts drawn evenly lie d frames apart with a chance that falls linearly in d, the law the
    paper chose. Each clip has one augmentation in all of its frames; ours is milder than the
    paper's (no rescaled crop, no blur), and appearance does answer much of this task. Published for
    an R3D-50 on Kinetics-600: 70.4 % by a linear probe. Metric: the share of other videos' clips
    that are farther than the partner. Chance: 1/2.
    """

    metric, chance = "ranked", 1 / 2

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """One clip of every video, then another [2n, 3, t, h, w], and each one's partner [2n]; n =
        b / 2, but two or more."""
        videos = videos[: max(2, (len(videos) + 1) // 2)]
        clips = [
            augment(sample_clips(videos, self.length, self.stride, rng), rng, strength=2.0)
            for _ in range(2)
        ]
        return torch.cat(clips), torch.arange(2 * len(videos), device=videos.device).roll(
            len(videos)
        )

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        z = normalize(self.project(backbone(clips)), dim=1)
        alike = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)  # a clip is not its own negative
        partner = alike.gather(1, target[:, None])
        farther = (alike < partner).sum(1) - 1  # the clip itself, at minus infinity, does not count
        return cross_entropy(alike, target), farther.float().mean() / (len(z) - 2)
