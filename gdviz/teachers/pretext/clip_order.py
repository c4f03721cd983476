"""Clip order prediction: in which order are three sub-clips of a video shown? (VCOP, Xu et al.
2019)."""

from __future__ import annotations

from itertools import combinations, permutations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from gdviz.data.clips import augment, sample_clips
from gdviz.teachers.backbones import Backbone


class ClipOrder(nn.Module):
    """Names which of the 3! orders three sub-clips are shown in. Loss: cross-entropy. Metric:
    accuracy. Chance: 1/6.

    As in the paper, features are concatenated pair by pair, ``g_ij = relu(W [f_i, f_j])``, and
    classified from all ``g_ij`` together, and the gaps are half a sub-clip. Ours: sub-clips are
    half a clip, so that three fit, and one augmentation serves all three, so that nothing but
    motion tells them apart; no dropout. Published for R3D, pre-trained and fine-tuned on UCF101:
    64.9 % there, 29.5 % on HMDB51. On the embedded data, where all motion is cyclic, a tiny16 was
    still at chance after 60 passes.
    """

    metric, chance = "accuracy", 1 / 6
    orders = tuple(permutations(range(3)))

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        if length < 4:
            raise ValueError(
                f"length={length}: sub-clips are half a clip and need two frames; give clip-order "
                "4 frames or more"
            )
        self.length, self.stride = length // 2, stride
        self.pair, self.head = nn.Linear(2 * dim, dim), nn.Linear(3 * dim, len(self.orders))

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Sub-clips as shown, all the first ones, all the second, all the third [3b, 3, t, h, w],
        and the order [b]."""
        step = self.length + self.length // 2
        whole = augment(sample_clips(videos, 2 * step + self.length, self.stride, rng), rng)
        parts = torch.stack(
            [whole[:, :, i * step : i * step + self.length] for i in range(3)]
        )  # (3, b, 3, t, h, w)
        target = torch.randint(len(self.orders), (len(videos),), generator=rng)
        order, rows = torch.tensor(self.orders)[target].T, torch.arange(len(videos))
        return parts[order.to(videos.device), rows.to(videos.device)].flatten(0, 1), target.to(
            videos.device
        )

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [torch.cat(two, 1) for two in combinations(backbone(clips).chunk(3), 2)]
        logits = self.head(torch.cat([torch.relu(self.pair(two)) for two in pairs], 1))
        return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
