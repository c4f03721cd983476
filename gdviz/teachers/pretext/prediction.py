"""Prediction: paint the frame that comes next (Srivastava et al. 2015; Vondrick et al. 2016)."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate

from gdviz.core import distributed
from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Scored, Videos, draw_clips


class FuturePrediction(nn.Module):
    """Predict what changes between a clip's last frame and the frame one stride later.

    Loss: squared error of the predicted change, divided by that of "nothing changes", a mean over
    the whole batch. Metric: 1 - loss, the share of the change explained. Chance: 0, copying the
    last frame. Its papers report no such number.
    """

    metric, chance = "explained", 0.0

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.squeeze = nn.Conv3d(dim, 32, 1)
        self.paint = nn.Sequential(
            nn.Conv2d(32 + 3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1)
        )

    def views(
        self, videos: Videos, rng: Generator
    ) -> tuple[Float[Tensor, "b 3 t h w"], Float[Tensor, "b 3 h w"]]:
        """Return clips and the frames that follow them."""
        clips = draw_clips(videos, self.length + 1, self.stride, rng)
        return clips[:, :, :-1], clips[:, :, -1]

    def predict(
        self, backbone: Backbone, clips: Float[Tensor, "b 3 t h w"]
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the next frames."""
        last = clips[:, :, -1]
        code = self.squeeze(backbone.maps(clips)).mean(2)  # (b, 32, h2, w2)
        code = interpolate(code, last.shape[-2:], mode="bilinear", align_corners=False)
        return last + self.paint(torch.cat([code, last], 1))

    def forward(
        self, backbone: Backbone, clips: Tensor, target: Float[Tensor, "b 3 h w"]
    ) -> Scored:
        change = (target - clips[:, :, -1]).square().mean()
        change = distributed.gather(change[None]).mean()
        loss = (self.predict(backbone, clips) - target).square().mean() / (change + 1e-6)
        return loss, 1 - loss.detach()
