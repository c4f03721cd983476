"""Coherence: which clip moves as the world does? (odd-one-out, Fernando et al. 2017)."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Scored, Videos, draw_clips, score_choice


class TemporalCoherence(nn.Module):
    """Pick the intact clip beside one with swapped halves and one whose second half runs backwards.

    All three hold the same frames, so appearance does not help; the spoilt ones differ by a jump,
    or a sudden return, in the middle. Loss: ``-log softmax_c s(c)`` over the three (the choice of
    candidates is ours). Metric: accuracy. Chance: 1/3. Published (odd one out of videos' orders)
    for AlexNet, fine-tuned: 60.3 % on UCF101, 32.5 % on HMDB51.
    """

    metric, chance = "accuracy", 1 / 3

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.head = nn.Linear(dim, 1)

    def views(
        self, videos: Videos, rng: Generator
    ) -> tuple[Float[Tensor, "three_n 3 t h w"], Choice]:
        """Return clips intact, swapped, returning, and the intact one's place; n = b / 2.

        Half of the batch, because each video is seen three times.
        """
        half, middle = videos[: (len(videos) + 1) // 2], self.length // 2
        intact = draw_clips(half, self.length, self.stride, rng)
        swapped = intact.roll(middle, dims=2)
        returning = torch.cat([intact[:, :, :middle], intact[:, :, middle:].flip(2)], 2)
        target = torch.zeros(len(intact), dtype=torch.long, device=intact.device)
        return torch.cat([intact, swapped, returning]), target

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        scores = self.head(backbone(clips)).view(3, -1).T  # (n, 3)
        return score_choice(scores, target)
