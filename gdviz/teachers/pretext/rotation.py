"""Rotation: which way up is the video? (RotNet, Gidaris et al. 2018; 3D, Jing et al. 2018)."""

import torch
from torch import Generator, Tensor, nn

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Clips, Scored, Videos, draw_clips, score_choice


class Rotation(nn.Module):
    """Name by how many quarter turns a whole clip was turned.

    Loss: cross-entropy. Metric: accuracy. Chance: 1/4. All four forms of a clip share a batch
    (Gidaris et al.), so that its content does not help, only how it stands. Published for a 3D
    ResNet-18, pre-trained on Kinetics and fine-tuned: 62.9 % on UCF101, 33.7 % on HMDB51. Where the
    world has no up and down there is little to learn: on the embedded data a tiny16 was right on
    0.35 of its training clips after 60 passes.
    """

    metric, chance = "accuracy", 1 / 4

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 4)

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return clips of a quarter of the batch, turned 0 to 3 times, and how many times."""
        quarter = videos[: (len(videos) + 3) // 4]
        clips = draw_clips(quarter, self.length, self.stride, rng)
        turned = torch.cat([clips.rot90(k, (3, 4)) for k in range(4)])
        return turned, torch.arange(4, device=clips.device).repeat_interleave(len(clips))

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        return score_choice(self.head(backbone(clips)), target)
