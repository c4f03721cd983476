"""Clip order prediction: in which order do three sub-clips follow? (VCOP, Xu et al. 2019)."""

from itertools import combinations, permutations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from gdviz.core.files import UserError
from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Scored, Videos, draw_clips, score_choice


class ClipOrder(nn.Module):
    """Name which of the 3! orders three sub-clips come in.

    Loss: cross-entropy. Metric: accuracy. Chance: 1/6. As in the paper, gaps are half a sub-clip,
    features are joined pair by pair, ``g_ij = relu(W [f_i, f_j])``, and all ``g_ij`` classified
    together. Ours: a sub-clip is half a clip, so that three fit; one augmentation serves all three,
    so that motion alone tells them apart; no dropout. Published for R3D, pre-trained and fine-tuned
    on UCF101: 64.9 % there, 29.5 % on HMDB51. On the embedded data, where all motion is cyclic, a
    tiny16 was still at chance after 60 passes.
    """

    metric, chance = "accuracy", 1 / 6
    orders = tuple(permutations(range(3)))

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        if length < 4:
            raise UserError(
                f"length={length}: sub-clips are half a clip and need two frames; give clip-order "
                "4 frames or more"
            )
        self.length, self.stride = length // 2, stride
        self.pair, self.head = nn.Linear(2 * dim, dim), nn.Linear(3 * dim, len(self.orders))

    def views(
        self, videos: Videos, rng: Generator
    ) -> tuple[Float[Tensor, "3*b 3 t h w"], Int[Tensor, " b"]]:
        """Return all first sub-clips, all second, all third, and the order of each video's."""
        step = self.length + self.length // 2
        whole = draw_clips(videos, 2 * step + self.length, self.stride, rng)
        parts = [whole[:, :, start : start + self.length] for start in (0, step, 2 * step)]
        target = torch.randint(len(self.orders), (len(videos),), generator=rng)
        order = torch.tensor(self.orders)[target].T  # (3, b)
        rows = torch.arange(len(videos), device=videos.device)
        shuffled = torch.stack(parts)[order.to(videos.device), rows]
        return shuffled.flatten(0, 1), target.to(videos.device)

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        pairs = [torch.cat(two, 1) for two in combinations(backbone(clips).chunk(3), 2)]
        together = torch.cat([torch.relu(self.pair(two)) for two in pairs], 1)
        return score_choice(self.head(together), target)
