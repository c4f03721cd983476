"""Tasks that paint pixels. Metric: the share explained of what there is to paint."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from gdviz.core import distributed
from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Clips, PretextTask, Scored, Videos, draw_clips

Frames = Float[Tensor, "b 3 h w"]


class FuturePrediction(PretextTask):
    """Predict what changes between a clip's last frame and the frame one stride later.

    Loss: squared error of the predicted change, divided by that of "nothing changes", a mean over
    the whole batch. Metric: 1 - loss, the share of the change explained. Chance: 0, copying the
    last frame. Srivastava et al. 2015 and Vondrick et al. 2016 report no such number.
    """

    metric, chance = "explained", 0.0

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__(dim, length, stride)
        self.squeeze = nn.Conv3d(dim, 32, 1)
        first, last = nn.Conv2d(32 + 3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.paint = nn.Sequential(first, nn.ReLU(), last)

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Frames]:
        """Return clips and the frames that follow them."""
        clips = draw_clips(videos, self.length + 1, self.stride, rng)
        return clips[:, :, :-1], clips[:, :, -1]

    def predict(self, backbone: Backbone, clips: Clips) -> Frames:
        """Return the next frames."""
        last = clips[:, :, -1]
        code = self.squeeze(backbone.maps(clips)).mean(2)  # (b, 32, h2, w2)
        code = interpolate(code, last.shape[-2:], mode="bilinear", align_corners=False)
        return last + self.paint(torch.cat([code, last], 1))

    def forward(self, backbone: Backbone, clips: Clips, target: Frames) -> Scored:
        change = (target - clips[:, :, -1]).square().mean()
        change = distributed.gather(change[None]).mean()
        loss = (self.predict(backbone, clips) - target).square().mean() / (change + 1e-6)
        return loss, 1 - loss.detach()


class MaskedVideo(PretextTask):
    """Paint nine in ten cells of an 8 x 8 grid, each hidden in all frames of a clip (a tube).

    Target: cubes of two frames and 3 x 3 pixels (larger videos are averaged down to 24 x 24), with
    mean 0 and deviation 1 in each colour. Loss: squared error over hidden cubes, divided by that of
    painting zeros. Metric: 1 - loss, the share explained. Chance: 0. Unlike in VideoMAE (Tong et
    al. 2022), hidden pixels are blanked (grey) and cost time, as a convolution cannot leave them
    out; the decoder is two convolutions on the last maps. Published for a ViT-B, pre-trained on the
    same set and fine-tuned: 91.3 % on UCF101, 62.6 % on HMDB51. On the embedded data a tiny16
    explained 0.01 after 20 passes, and 0.04 with half of the cells hidden.
    """

    metric, chance, shortest = "explained", 0.0, 2
    grid, side, share = 8, 3, 0.9

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__(dim, length, stride)
        first, last = nn.Conv3d(dim, dim, 3, padding=1), nn.Conv3d(dim, 3 * 2 * self.side**2, 1)
        self.paint = nn.Sequential(first, nn.ReLU(), last)

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Float[Tensor, "n 4 t h w"]]:
        """Return clips with blanked tubes, and whole clips with the tubes as a fourth channel."""
        clips, cells = self.draw(videos, rng), self.grid**2
        drawn = torch.rand(len(clips), cells, generator=rng).argsort(1) < round(self.share * cells)
        tubes = drawn.view(-1, 1, 1, self.grid, self.grid).to(clips)
        hidden = interpolate(tubes, clips.shape[2:])
        return clips * (1 - hidden), torch.cat([clips, hidden], 1)

    def cubes(self, clips: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c p t2 g g"]:
        """Cut clips into the grid's cells, p = 2 * 3 * 3 values each."""
        grid, pixels = self.grid, self.grid * self.side
        even = clips[:, :, : self.length // 2 * 2]
        small = adaptive_avg_pool2d(even.flatten(0, 1), pixels).unflatten(0, even.shape[:2])
        cut = small.unflatten(2, (-1, 2)).unflatten(4, (grid, -1)).unflatten(6, (grid, -1))
        # (b, c, t2, 2, g, side, g, side): a cell's own axes move before those of the grid
        return cut.movedim((3, 5, 7), (2, 3, 4)).flatten(2, 4)

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> Scored:
        cubes, mask = self.cubes(target[:, :3]), self.cubes(target[:, 3:])
        hidden = mask.amin(2, keepdim=True) > 0.99
        flat = cubes - cubes.mean(2, keepdim=True)
        # 0.01: noise of a tenth of a deviation is not blown up
        wanted = flat / (flat.square().mean(2, keepdim=True) + 1e-2).sqrt()
        maps = backbone.maps(clips)
        maps = interpolate(maps, wanted.shape[3:], mode="trilinear", align_corners=False)
        painted = self.paint(maps).unflatten(1, wanted.shape[1:3])
        error = ((painted - wanted).square() * hidden).sum()
        loss = error / ((wanted.square() * hidden).sum() + 1e-6)
        return loss, 1 - loss.detach()
