"""Frame ordering: are these frames in order, or shuffled? (Misra et al. 2016, Shuffle and
Learn)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class FrameOrder(nn.Module):
    """Verifies temporal order: every clip is seen twice, in order and shuffled frame by frame.

    Loss: cross-entropy over (in order, shuffled). Chance: 1/2. Both forms of a clip share a batch
    (ours), so that appearance cannot answer; with one form each, training sometimes stayed at
    chance. Naming *which* of the 4! orders four sub-clips were put in (Lee et al. 2017; Xu et al.
    2019) never left chance within 20 passes over the embedded data with the small backbone.
    Published (Misra et al.) for CaffeNet, fine-tuned: 50.2 % on UCF101, 18.1 % on HMDB51.
    """

    metric, chance = "accuracy", 1 / 2

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 2)

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Clips in order, then the same shuffled [2n, 3, t, h, w], and which are [2n]; n = b / 2,
        because each is seen twice."""
        clips = augment(
            sample_clips(videos[: (len(videos) + 1) // 2], self.length, self.stride, rng), rng
        )
        order = torch.rand(len(clips), self.length, generator=rng).argsort(1)
        shuffled = clips.gather(
            2, order.to(clips.device).view(len(clips), 1, -1, 1, 1).expand_as(clips)
        )
        return torch.cat([clips, shuffled]), torch.arange(2, device=clips.device).repeat_interleave(
            len(clips)
        )

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(backbone(clips))
        return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
