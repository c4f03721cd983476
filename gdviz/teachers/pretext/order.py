"""Frame order: are these frames in order? (Shuffle and Learn, Misra et al. 2016)."""

import torch
from torch import Generator, Tensor, nn

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Clips, Scored, Videos, draw_clips, score_choice


class FrameOrder(nn.Module):
    """Verify temporal order: every clip is seen in order, and shuffled frame by frame.

    Loss: cross-entropy over (in order, shuffled). Metric: accuracy. Chance: 1/2. Both forms of a
    clip share a batch (ours), so that appearance does not help; with one form each, training
    sometimes stayed at chance. Naming *which* of the 4! orders four sub-clips were put in (Lee et
    al. 2017; Xu et al. 2019) never left chance within 20 passes over the embedded data. Published
    (Misra et al.) for CaffeNet, fine-tuned: 50.2 % on UCF101, 18.1 % on HMDB51.
    """

    metric, chance = "accuracy", 1 / 2

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 2)

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return clips of half of the batch in order, then the same shuffled, and which are."""
        half = videos[: (len(videos) + 1) // 2]
        clips = draw_clips(half, self.length, self.stride, rng)
        order = torch.rand(len(clips), self.length, generator=rng).argsort(1).to(clips.device)
        shuffled = clips.gather(2, order.view(len(clips), 1, -1, 1, 1).expand_as(clips))
        target = torch.arange(2, device=clips.device).repeat_interleave(len(clips))
        return torch.cat([clips, shuffled]), target

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        return score_choice(self.head(backbone(clips)), target)
