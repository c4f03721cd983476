"""Contrast: clips of one video are nearer than those of others (CVRL, Qian et al. 2021)."""

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Clips, PretextTask, Scored, Videos, draw_clips


class Contrast(PretextTask):
    """Tell a clip's partner, of the same video, from clips of other videos.

    Loss: InfoNCE over 2n clips of n videos, ``-log exp(z_i.z_i'/t) / sum_{j != i} exp(z_i.z_j/t)``,
    t = 0.1, |z| = 1. Metric: the share of other videos' clips that are farther than the partner.
    Chance: 1/2. Two evenly drawn starts lie d frames apart with a chance that falls linearly in d,
    the law the paper chose. The augmentation is milder than the paper's (no rescaled crop, no
    blur), and appearance solves much of this task. Published for an R3D-50 on Kinetics-600: 70.4 %
    by a linear probe.
    """

    metric, chance = "ranked", 1 / 2

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__(dim, length, stride)
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return one clip of half of the videos, then another, and the place of each's partner."""
        videos = videos[: max(2, (len(videos) + 1) // 2)]  # one alone has no other to differ from
        clips = [draw_clips(videos, self.length, self.stride, rng, strength=2.0) for _ in range(2)]
        place = torch.arange(2 * len(videos), device=videos.device)
        return torch.cat(clips), place.roll(len(videos))

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        z = normalize(self.project(backbone(clips)), dim=1)
        alike = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)  # a clip is not its own negative
        partner = alike.gather(1, target[:, None])
        farther = (alike < partner).sum(1) - 1  # without the clip itself, at minus infinity
        return cross_entropy(alike, target), farther.float().mean() / (len(z) - 2)
