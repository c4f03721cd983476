"""Temporal coherence: of several clips made of the same frames, one moves as the world does
(Fernando et al. 2017, odd-one-out)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class TemporalCoherence(nn.Module):
    """Picks the coherent clip out of three of one video: intact, with its halves swapped, with its
    second half backwards.

    All three show the same frames, so appearance cannot answer; the spoilt ones differ from the
    intact one by a jump, or by a sudden return, in the middle. Loss: ``-log softmax_c s(c)`` over
    the three, a contrast within the video (the choice of candidates is ours). Metric: accuracy.
    Chance: 1/3. Published (Fernando et al., odd one out of videos' orders) for AlexNet, fine-tuned:
        60.3 % on UCF101, 32.5 % on HMDB51.
    """

    metric, chance = "accuracy", 1 / 3

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 1)

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Clips intact, swapped, returning [3n, 3, t, h, w] and the intact one's place [n]; n = b /
        2.

        Half of the batch, because each video is seen three times.
        """
        intact = augment(
            sample_clips(videos[: (len(videos) + 1) // 2], self.length, self.stride, rng), rng
        )
        half = self.length // 2
        swapped = intact.roll(half, dims=2)
        returning = torch.cat([intact[:, :, :half], intact[:, :, half:].flip(2)], 2)
        return torch.cat([intact, swapped, returning]), torch.zeros(
            len(intact), dtype=torch.long, device=intact.device
        )

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(backbone(clips)).view(3, -1).T  # (n, 3)
        return cross_entropy(scores, target), (scores.argmax(1) == target).float().mean()
