"""Tasks that name one of several answers."""

from itertools import combinations, permutations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gdviz.teachers.backbones import Backbone
from gdviz.teachers.pretext.common import Choice, Clips, PretextTask, Scored, Videos, draw_clips


class FrameOrder(PretextTask):
    """Verify temporal order: every clip is seen in order, and shuffled frame by frame.

    Loss: cross-entropy over (in order, shuffled). Metric: accuracy. Chance: 1/2. After Shuffle and
    Learn (Misra et al. 2016). Both forms of a clip share a batch (ours), so that appearance does
    not help; with one form each, training sometimes stayed at chance. Naming *which* of the 4!
    orders four sub-clips were put in (Lee et al. 2017; Xu et al. 2019) never left chance within 20
    passes over the embedded data. Published for CaffeNet, fine-tuned: 50.2 % on UCF101, 18.1 % on
    HMDB51.
    """

    chance, outputs, shortest = 1 / 2, 2, 4  # of fewer frames many a shuffle is in order

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return clips of half of the batch in order, then the same shuffled, and which are."""
        clips = self.draw(videos, rng, forms=2)
        order = torch.rand(len(clips), self.length, generator=rng).argsort(1).to(clips.device)
        shuffled = clips.gather(2, order.view(len(clips), 1, -1, 1, 1).expand_as(clips))
        target = torch.arange(2, device=clips.device).repeat_interleave(len(clips))
        return torch.cat([clips, shuffled]), target


class TemporalCoherence(PretextTask):
    """Pick the intact clip beside one with swapped halves and one whose second half runs backwards.

    All three hold the same frames, so appearance does not help; the spoilt ones differ by a jump,
    or a sudden return, in the middle. Loss: ``-log softmax_c s(c)`` over the three. Metric:
    accuracy. Chance: 1/3. After odd-one-out (Fernando et al. 2017); these candidates are ours.
    Published for AlexNet, fine-tuned: 60.3 % on UCF101, 32.5 % on HMDB51.
    """

    chance, outputs, shortest = 1 / 3, 1, 4  # half of fewer runs backwards unseen

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Tensor]:
        """Return half of the clips intact, swapped and returning, and the intact one's place."""
        intact, middle = self.draw(videos, rng, forms=2), self.length // 2
        returning = torch.cat([intact[:, :, :middle], intact[:, :, middle:].flip(2)], 2)
        target = torch.zeros(len(intact), dtype=torch.long, device=intact.device)
        return torch.cat([intact, intact.roll(middle, dims=2), returning]), target

    def answer(self, features: Tensor) -> Tensor:
        return self.head(features).view(3, -1).T


class PlaybackPace(PretextTask):
    """Name the stride a clip was taken with: 1, 2 or 3.

    Loss: cross-entropy. Metric: accuracy. Chance: 1/3. Benaim et al. 2020; Wang et al. 2020, who
    publish, with a contrastive loss beside, for R(2+1)D, pre-trained on Kinetics and fine-tuned:
    77.1 % on UCF101, 36.6 % on HMDB51.
    """

    chance, outputs, strides = 1 / 3, 3, (1, 2, 3)

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return clips and the index of each one's stride."""
        needed = 1 + (self.length - 1) * max(self.strides)
        if videos.shape[1] < needed:
            problem = f"clips of {self.length} frames at pace {max(self.strides)} need {needed}"
            raise ValueError(f"{problem} kept frames of a video, not {videos.shape[1]}")
        target = torch.randint(len(self.strides), (len(videos),), generator=rng)
        strides = torch.tensor(self.strides)[target]
        return draw_clips(videos, self.length, strides, rng), target.to(videos.device)


class ClipOrder(PretextTask):
    """Name which of the 3! orders three sub-clips come in (VCOP, Xu et al. 2019).

    Loss: cross-entropy. Metric: accuracy. Chance: 1/6. As in the paper, gaps are half a sub-clip,
    features are joined pair by pair, ``g_ij = relu(W [f_i, f_j])``, and all ``g_ij`` classified
    together. Ours: a sub-clip is half a clip, so that three fit; one augmentation serves all three,
    so that motion alone tells them apart; no dropout. Published for R3D, pre-trained and fine-tuned
    on UCF101: 64.9 % there, 29.5 % on HMDB51. On the embedded data, where all motion is cyclic, a
    tiny16 was still at chance after 60 passes.
    """

    chance, shortest = 1 / 6, 4  # two frames a sub-clip
    orders = tuple(permutations(range(3)))

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__(dim, length, stride)
        self.pair, self.head = nn.Linear(2 * dim, dim), nn.Linear(3 * dim, len(self.orders))

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Tensor]:
        """Return all first sub-clips, all second, all third, and the order of each video's."""
        length = self.length // 2
        step = length + length // 2
        whole = draw_clips(videos, 2 * step + length, self.stride, rng)
        parts = torch.stack([whole[:, :, start : start + length] for start in (0, step, 2 * step)])
        target = torch.randint(len(self.orders), (len(videos),), generator=rng)
        order = torch.tensor(self.orders)[target].T.to(videos.device)  # (3, b)
        shuffled = parts[order, torch.arange(len(videos), device=videos.device)]
        return shuffled.flatten(0, 1), target.to(videos.device)

    def answer(self, features: Tensor) -> Tensor:
        pairs = [torch.cat(two, 1) for two in combinations(features.chunk(3), 2)]
        return self.head(torch.cat([torch.relu(self.pair(two)) for two in pairs], 1))


class Rotation(PretextTask):
    """Name by how many quarter turns a whole clip was turned.

    Loss: cross-entropy. Metric: accuracy. Chance: 1/4. All four forms of a clip share a batch
    (RotNet, Gidaris et al. 2018; 3D, Jing et al. 2018), so that its content does not help, only how
    it stands. Published for a 3D ResNet-18, pre-trained on Kinetics and fine-tuned: 62.9 % on
    UCF101, 33.7 % on HMDB51. Where the world has no up and down there is little to learn: on the
    embedded data a tiny16 was right on 0.35 of its training clips after 60 passes.
    """

    chance, outputs = 1 / 4, 4

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return clips of a quarter of the batch, turned 0 to 3 times, and how many times."""
        clips = self.draw(videos, rng, forms=4)
        turned = torch.cat([clips.rot90(k, (3, 4)) for k in range(4)])
        return turned, torch.arange(4, device=clips.device).repeat_interleave(len(clips))


class Contrast(PretextTask):
    """Tell a clip's partner, of the same video, from clips of others (CVRL, Qian et al. 2021).

    Loss: InfoNCE over 2n clips of n videos, ``-log exp(z_i.z_i'/t) / sum_{j != i} exp(z_i.z_j/t)``,
    t = 0.1, |z| = 1. Metric: the share of other videos' clips that are farther than the partner.
    Chance: 1/2. Two evenly drawn starts lie d frames apart with a chance that falls linearly in d,
    the law the paper chose. The augmentation is milder than the paper's (no rescaled crop, no
    blur), and appearance solves much of this task. Published for an R3D-50 on Kinetics-600: 70.4 %
    by a linear probe.
    """

    metric, chance = "ranked", 1 / 2

    def __init__(self, dim: int, length: int, stride: int) -> None:
        super().__init__(dim, length, stride)
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))

    def views(self, videos: Videos, rng: Generator) -> tuple[Clips, Choice]:
        """Return one clip of half of the videos, then another, and the place of each's partner."""
        videos = videos[: max(2, (len(videos) + 1) // 2)]  # one alone has no other to differ from
        clips = [draw_clips(videos, self.length, self.stride, rng, strength=2.0) for _ in range(2)]
        place = torch.arange(2 * len(videos), device=videos.device)
        return torch.cat(clips), place.roll(len(videos))

    def forward(self, backbone: Backbone, clips: Tensor, target: Choice) -> Scored:
        z = normalize(self.project(backbone(clips)), dim=1)
        alike = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)  # a clip is not its own negative
        partner = alike.gather(1, target[:, None])
        farther = (alike < partner).sum(1) - 1  # without the clip itself, at minus infinity
        return cross_entropy(alike, target), farther.float().mean() / (len(z) - 2)
