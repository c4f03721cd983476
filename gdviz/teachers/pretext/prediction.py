"""Future-frame prediction: paint the frame that comes next (Srivastava et al. 2015; Vondrick et al.
2016)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate

from gdviz.core import distributed
from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class FuturePrediction(nn.Module):
    """Predicts what changes between a clip's last frame and the frame one stride later.

    Loss: mean squared error of the predicted change, divided by that of "nothing changes".
    Metric: the share of the change explained, 1 - loss (copying the last frame: 0). A ratio of
    means over the batch, that of all ranks. Its papers report no such number.
    """

    metric, chance = "explained", 0.0

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.squeeze = nn.Conv3d(dim, 32, 1)
        self.paint = nn.Sequential(
            nn.Conv2d(32 + 3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1)
        )

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Clips [b, 3, t, h, w] and the frames that follow them [b, 3, h, w]."""
        clips = augment(sample_clips(videos, self.length + 1, self.stride, rng), rng)
        return clips[:, :, :-1], clips[:, :, -1]

    def predict(self, backbone: Backbone, clips: Tensor) -> Tensor:
        """The next frames [b, 3, h, w]."""
        last = clips[:, :, -1]
        code = self.squeeze(backbone.maps(clips)).mean(2)  # (b, 32, h2, w2)
        code = interpolate(code, last.shape[-2:], mode="bilinear", align_corners=False)
        return last + self.paint(torch.cat([code, last], 1))

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        still = distributed.gather((target - clips[:, :, -1]).square().mean()[None]).mean()
        loss = (self.predict(backbone, clips) - target).square().mean() / (still + 1e-6)
        return loss, 1 - loss.detach()
