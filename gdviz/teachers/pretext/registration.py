"""Geometric registration: estimate the transform between two views (DeTone et al. 2016; Gan et al.
2018)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, smooth_l1_loss

from gdviz.core import distributed
from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class Registration(nn.Module):
    """Regresses the similarity transform between the first and the last view of a camera path.

    One frame of the video is seen by a camera that shifts, turns and zooms at constant speed.
    Target: (dx, dy, angle, log zoom) over the whole path, each divided by its range to lie in
    [-1, 1]. Loss: smooth L1. Metric: the share of the targets' variance explained (R^2; chance 0).
    DeTone et al. register images and report corner errors in pixels, which do not compare.
    """

    metric, chance = "r2", 0.0
    ranges = (0.8, 0.8, math.pi / 2, 0.7)

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length = length
        self.head = nn.Linear(dim, 4)

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Camera paths [b, 3, t, h, w] and scaled transforms [b, 4]."""
        frame = augment(sample_clips(videos, 1, 1, rng), rng).squeeze(2)
        target = torch.rand(len(frame), 4, generator=rng) * 2 - 1
        along = torch.linspace(
            -0.5, 0.5, self.length
        )  # the path is centred, so that no end looks special
        dx, dy, angle, zoom = (target[:, None] * torch.tensor(self.ranges) * along[:, None]).unbind(
            -1
        )  # (b, t)
        c, s = torch.cos(angle) * torch.exp(zoom), torch.sin(angle) * torch.exp(zoom)
        theta = torch.stack(
            [torch.stack([c, -s, dx], -1), torch.stack([s, c, dy], -1)], -2
        ).flatten(0, 1)
        frames = frame.repeat_interleave(self.length, 0)  # (b t, 3, h, w)
        grid = affine_grid(theta.to(frames), list(frames.shape), align_corners=False)
        seen = grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
        return seen.unflatten(0, (-1, self.length)).transpose(1, 2), target.to(frame)

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        estimate = self.head(backbone(clips))
        said, truth = distributed.gather(torch.cat([estimate.detach(), target], 1)).chunk(
            2, 1
        )  # a variance is of the whole batch
        explained = 1 - (said - truth).square().mean() / truth.var(0, correction=0).mean()
        return smooth_l1_loss(estimate, target, beta=0.2), explained
