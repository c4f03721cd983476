"""What frozen teachers know: their outputs on every video, stacked, and the ground cost they imply."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from gdviz.config import Distillation
from gdviz.data.videos import VideoSet
from gdviz.graphs import (
    LogitsGraph,
    RepresentationGraph,
    average_costs,
    cost_from_means,
    zero_one_cost,
)
from gdviz.graphs.costs import normalise_cost
from gdviz.teachers.fit import TeacherOutputs
from gdviz.teachers.readout import ClipOutputs


@dataclass(frozen=True)
class Knowledge:
    """What the frozen teachers say of every video of the set; rows are videos."""

    teachers: tuple[str, ...]
    logits: Float[Tensor, "n k c"]  # divided by each teacher's calibration temperature
    features: list[Float[Tensor, "n d"]]
    held_features: list[Float[Tensor, "n d"]]  # out of fold on labelled videos, and else the same
    labels: Tensor  # (n,) labels of the labelled training part, else -1
    fold: Tensor  # (n,) cross-fitting fold of a labelled video, else -1
    temperatures: Float[Tensor, " k"] | None = None  # what logits by clip are divided by
    clips: tuple[ClipOutputs, ...] = ()  # of each teacher, where a student is taught clip by clip
    dealt: Tensor | None = None  # (n,) whose knowledge row i is, where shuffled

    def probs(self, temperature: float = 1.0) -> Float[Tensor, "n k c"]:
        return torch.softmax(self.logits / temperature, dim=-1)

    def said(self, rows: Tensor, clips: Tensor | None = None) -> Float[Tensor, "b k c"]:
        """Calibrated logits on these videos, or on one clip of each."""
        if clips is None:
            return self.logits[rows]
        logits = [teacher.at("logits", self._of(rows), clips) for teacher in self.clips]
        return torch.stack(logits, 1) / self.temperatures[:, None]

    def shown(
        self, rows: Tensor, clips: Tensor | None = None, *, held: bool = False
    ) -> list[Float[Tensor, "b d"]]:
        """Features of these videos, or of one clip of each; with ``held`` those out of fold."""
        if clips is None:
            return [f[self._of(rows)] for f in (self.held_features if held else self.features)]
        return [teacher.at("features", self._of(rows), clips) for teacher in self.clips]

    def _of(self, rows: Tensor) -> Tensor:
        return rows if self.dealt is None else self.dealt[rows]

    def shuffled(self, rows: Tensor, seed: int) -> Knowledge:
        """The control: what is known of the clips in ``rows``, dealt to the wrong ones of them."""
        order = torch.arange(len(self.labels))
        order[rows] = rows[torch.randperm(len(rows), generator=Generator().manual_seed(seed))]
        return replace(
            self, logits=self.logits[order], dealt=self._of(order)
        )  # features stay where they are: in files

    def best_teacher(self) -> str:
        """The one most often right out of fold on the labelled clips: a choice that needs no test labels."""
        known = self.labels >= 0
        right = (self.logits[known].argmax(-1) == self.labels[known, None]).float().mean(0)
        return self.teachers[int(right.argmax())]


def gather(
    outputs: dict[str, TeacherOutputs], videos: VideoSet, clips: tuple[ClipOutputs, ...] = ()
) -> Knowledge:
    """Stacks the teachers' outputs, and by clip if need be. Labels outside the labelled training part are not passed on."""
    known = torch.tensor([split == "train" for split in videos.splits])
    return Knowledge(
        teachers=tuple(outputs),
        logits=torch.stack([o.logits / o.temperature for o in outputs.values()], 1),
        features=[o.features for o in outputs.values()],
        held_features=[o.held_features for o in outputs.values()],
        labels=torch.where(known, videos.labels, -1),
        fold=next(iter(outputs.values())).fold,
        temperatures=torch.stack([o.temperature for o in outputs.values()]),
        clips=clips,
    )


def ground_cost(knowledge: Knowledge, shrink: float) -> Float[Tensor, "c c"]:
    """Distances between class means of the teachers' out-of-fold logits, averaged over teachers.

    ``shrink`` is the share of the 0/1 cost mixed in: 0 only the teachers', 1 only the 0/1 cost.
    """
    known, classes = knowledge.labels >= 0, knowledge.logits.shape[-1]
    # A teacher that says the same of every clip has no opinion on how far apart classes are.
    per_teacher = [z for z in knowledge.logits[known].unbind(1) if float(z.std(0).max()) > 1e-6]
    costs = [cost_from_means(z, knowledge.labels[known], classes) for z in per_teacher] or [
        zero_one_cost(classes)
    ]
    learned = average_costs(costs)
    return normalise_cost(learned, shrink=shrink)


def build_graphs(
    knowledge: Knowledge, student_dim: int, rows: Tensor, cfg: Distillation
) -> tuple[LogitsGraph, RepresentationGraph]:
    """Both graphs over the teachers; ``rows`` (the training videos) set the feature scales."""
    logits_graph = LogitsGraph(
        knowledge.teachers,
        ground_cost(knowledge, cfg.cost_shrink),
        eps=cfg.eps,
        beta=cfg.beta,
        temperature=cfg.temperature,
        tol=1e-4,
    )
    dims = [f.shape[1] for f in knowledge.features]
    representation_graph = RepresentationGraph(
        knowledge.teachers, dims, student_dim, distance=cfg.distance
    )
    some = rows[:: 1 + len(rows) // 10_000]  # features may be larger than memory
    representation_graph.fit_scalers(knowledge.shown(some))
    return logits_graph, representation_graph
