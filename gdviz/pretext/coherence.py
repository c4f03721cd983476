"""Temporal coherence: neighbouring clips agree, other videos and shuffled time do not (Mobahi et al. 2009; Wang & Gupta 2015)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gdviz.data.sampling import augment, sample_clips
from gdviz.models import Backbone


class TemporalCoherence(nn.Module):
    """Contrastive slowness: a clip's neighbour in time, among other videos and scrambled copies.

    Loss: InfoNCE (van den Oord et al. 2018), -log softmax_n(<a_n, c> / 0.1) over candidates c = all
    neighbours and all time-scrambled neighbours of the batch. Metric: how often the true one wins.
    """

    metric, chance = "accuracy", 0.0

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 64))

    def views(self, videos: Float[Tensor, "b f 3 h w"], rng: Generator) -> tuple[Tensor, Tensor]:
        """Anchors, neighbours, scrambled neighbours [3n, 3, t, h, w] and the neighbours' places [n]; n = b / 2.

        Half of the batch, because each video is seen three times.
        """
        videos = videos[: (len(videos) + 1) // 2]
        anchor, near = (augment(sample_clips(videos, self.length, self.stride, rng), rng) for _ in range(2))
        order = torch.rand(len(near), self.length, generator=rng).argsort(1).to(near.device)
        scrambled = near.gather(2, order.view(len(near), 1, -1, 1, 1).expand_as(near))
        return torch.cat([anchor, near, scrambled]), torch.arange(len(near), device=near.device)

    def forward(self, backbone: Backbone, clips: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        anchor, *candidates = normalize(self.head(backbone(clips)), dim=1).chunk(3)
        logits = anchor @ torch.cat(candidates).T / 0.1  # (n, 2n)
        return cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
