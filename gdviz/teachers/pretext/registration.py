"""Registration: how did the camera move? (DeTone et al. 2016; Gan et al. 2018)."""

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, smooth_l1_loss

from gdviz.core import distributed
from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Clips, PretextTask, Scored, Videos, draw_clips


class Registration(PretextTask):
    """Regress the similarity transform between the first and the last view of a camera path.

    A camera that shifts, turns and zooms at constant speed sees one frame of the video. Target:
    (dx, dy, angle, log zoom) over the whole path, each divided by its range to lie in [-1, 1].
    Loss: smooth L1. Metric: R^2, the share of the targets' variance explained. Chance: 0. DeTone et
    al. register images and report corner errors in pixels, which do not compare.
    """

    metric, chance, outputs = "r2", 0.0, 4
    ranges = (0.8, 0.8, math.pi / 2, 0.7)

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Tensor]:
        """Return camera paths and scaled transforms [b, 4]."""
        frame = draw_clips(videos, 1, 1, rng).squeeze(2)
        target = torch.rand(len(frame), 4, generator=rng) * 2 - 1
        # The path is centred, so that no end looks special.
        along = torch.linspace(-0.5, 0.5, self.length)[:, None]
        path = target[:, None] * torch.tensor(self.ranges) * along  # (b, t, 4)
        dx, dy, angle, zoom = path.unbind(-1)
        c, s = torch.cos(angle) * torch.exp(zoom), torch.sin(angle) * torch.exp(zoom)
        theta = torch.stack([c, -s, dx, s, c, dy], -1).view(-1, 2, 3)
        frames = frame.repeat_interleave(self.length, 0)  # (b t, 3, h, w)
        grid = affine_grid(theta.to(frames), list(frames.shape), align_corners=False)
        seen = grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
        return seen.unflatten(0, (-1, self.length)).transpose(1, 2), target.to(frame)

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> Scored:
        estimate = self.head(backbone(clips))
        # A variance is one of the whole batch.
        both = distributed.gather(torch.cat([estimate.detach(), target], 1))
        estimates, truth = both.chunk(2, 1)
        explained = 1 - (estimates - truth).square().mean() / truth.var(0, correction=0).mean()
        return smooth_l1_loss(estimate, target, beta=0.2), explained
